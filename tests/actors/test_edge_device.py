"""A device: hostile answers are refused, training resumes, profiles and state are kept."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from edge_parts import MODEL, PLAN, QUIET, RECIPE, device_config

from actors.edge.agent import DeviceAgent
from actors.edge.config import SamplesConfig
from actors.edge.device import Device
from actors.edge.errand import DONE, FAILED
from actors.edge.profiles import Profiles
from actors.edge.simulated import SimulateConfig, SimulatedFleet
from actors.edge.state import StateFolder, Work
from actors.edge.trainer import train_plan
from actors.proto.edge_messages import pb, rpc
from raysys import machine
from raysys.errors import ConfigError, DataError, InfeasibleError, RemoteError, StorageError
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.model import Mlp, ModelSpec, initial_weights
from raysys.federated.swan.plans import PlanRefusedError, pack_weights, plan_to_json
from raysys.federated.swan.willingness import WillingnessConfig


class Hostile(rpc.EdgePlaneServicer):  # type: ignore[misc]
    """Answers as told; everything else as an honest server would."""

    def __init__(self, spoil: Callable[[Any], None], model: bytes = MODEL) -> None:
        self.spoil, self.model = spoil, model

    async def GetPlan(self, request: Any, context: Any) -> Any:
        answer = pb.PlanAnswer(
            lease=request.lease, challenge=request.challenge, nonce=b"n", plan=plan_to_json(PLAN),
            model_bytes=len(self.model), model_sha256=hashlib.sha256(self.model).digest(),
        )  # fmt: skip
        self.spoil(answer)
        return answer

    async def Download(self, request: Any, context: Any) -> Any:
        if self.model == b"endless":
            for number in range(10**6):
                yield pb.Chunk(offset=7 * number, content=b"endless")
        yield pb.Chunk(offset=0, content=self.model)

    async def Progress(self, request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the lease has expired")


def nothing(answer: Any) -> None:
    """Leave the answer honest."""


CASES: dict[str, tuple[Callable[[Any], None], bytes, str]] = {
    "replayed": (lambda a: setattr(a, "challenge", b"old"), MODEL, "refused"),
    "another lease": (lambda a: setattr(a.lease, "counter", 99), MODEL, "refused"),
    "oversized": (lambda a: setattr(a, "model_bytes", 2**40), MODEL, "refused"),
    "operator": (
        lambda a: setattr(a, "plan", '{"format":1,"architecture":"exec"}'),
        MODEL,
        "refused",
    ),
    "no plan": (lambda a: setattr(a, "plan", "\x00"), MODEL, "refused"),
    "checksum": (lambda a: setattr(a, "model_sha256", b"x" * 32), MODEL, "refused"),
    "shape": (nothing, pack_weights(np.zeros(3, dtype=np.float32)), "refused"),
    "pickle": (nothing, b"\x80\x04cos\nsystem\n(S'true'\ntR.", "refused"),
    "endless": (nothing, b"endless", "refused"),
    "expired lease": (nothing, MODEL, "failed"),
}


def test_hostile_answers_are_refused_and_the_device_lives_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        agent = DeviceAgent(device_config(tmp_path, 0, "127.0.0.1:1"))
        for number, (name, (spoil, model, outcome)) in enumerate(CASES.items()):
            server = grpc.aio.server()
            rpc.add_EdgePlaneServicer_to_server(Hostile(spoil, model), server)
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            end = f"127.0.0.1:{port}"
            released = []
            agent.device.gateway = lambda address, seen=released: Gateway(seen)  # type: ignore[method-assign]
            work = Work(end, "g", 1, number, f"job-{number}", 0, end, end, time.time() + 60)
            await asyncio.wait_for(agent.errand.run(work), 120)
            await server.stop(0)
            assert agent.device.events[-1]["kind"] == outcome, (name, agent.device.events[-1])
            assert agent.device.state.work is None, name
            assert released == [[1 if outcome == "refused" else 2]], name
        elsewhere = Work("g:1", "g", 1, 1000, "j", 0, "evil.example:1", end, time.time() + 60)
        await agent.errand.run(elsewhere)
        assert "not among the allowed hosts" in agent.device.events[-1]["text"]
        again = Work(end, "g", 1, 0, "fresh", 0, end, end, time.time() + 60)
        await agent.errand.run(again)
        assert "replayed" in agent.device.events[-1]["text"]
        shunned = Work(end, "g", 1, 1001, "job-0", 0, end, end, time.time() + 60)
        await agent.errand.run(shunned)
        assert "was refused before" in agent.device.events[-1]["text"]

    asyncio.run(scenario())
    assert DeviceAgent(device_config(tmp_path, 0, "127.0.0.1:1")).device.state.done


class Gateway:
    """Takes leases back."""

    def __init__(self, released: list[list[int]]) -> None:
        self.released = released

    async def __aenter__(self) -> Gateway:
        return self

    async def __aexit__(self, *error: object) -> None:
        return None

    async def release(self, epoch: int, leases: list[int], outcomes: list[int]) -> bytes:
        self.released.append(outcomes)
        return b"\x01"

    async def prolong(self, epoch: int, leases: list[int]) -> tuple[list[float], bytes]:
        return [60.0], b""


def test_training_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    import threading

    from actors.swan.engine import Swan
    from raysys.errors import InterruptedRunError

    samples = SamplesConfig(split=RECIPE.partition).load()
    local = LocalConfig(epochs=2, batch_size=64, momentum=0.9, weight_decay=1e-3, prox_mu=0.1)
    plan = dataclasses.replace(PLAN, local=local)
    weights = initial_weights(plan.spec, 0).values
    straight = train_plan(plan, weights, samples)
    stop = threading.Event()
    stop.set()
    config = dataclasses.replace(QUIET, checkpoint_s=1e-6)
    folder = tmp_path / "ck"
    with Swan(config) as engine:
        with pytest.raises(InterruptedRunError):
            train_plan(plan, weights, samples, engine=engine, folder=folder, stopped=stop)
        resumed = train_plan(plan, weights, samples, engine=engine, folder=folder)
    assert np.array_equal(straight.delta, resumed.delta)
    clipped = train_plan(dataclasses.replace(plan, clip_norm=0.01), weights, samples)
    assert np.linalg.norm(clipped.delta) == pytest.approx(0.01, rel=1e-4)
    wrong = dataclasses.replace(plan, spec=ModelSpec(architecture=Mlp(sizes=(5, 2))))
    start = initial_weights(wrong.spec, 0).values
    with pytest.raises(ConfigError, match="fits this device's samples"):
        train_plan(wrong, start, samples)


def test_profiles_are_remembered_shared_and_checked(tmp_path: Path) -> None:
    times = {"now": 0.0}
    config = device_config(tmp_path, 0, "127.0.0.1:1")
    device = Device(config, clock=lambda: times["now"])
    profiles = Profiles(device)
    key = profiles.key(PLAN)
    good = {"schema": 1, "device": profiles.kind, "choices": [{"counts": [1], "seconds": 1.0}]}
    told: list[tuple[str, bool]] = []
    answers = iter(["{", "[]", json.dumps({**good, "device": "other"}), "", json.dumps(good)])

    class Edge:
        async def __aenter__(self) -> Edge:
            return self

        async def __aexit__(self, *error: object) -> None:
            return None

        async def share_profile(self, key: str, profile: str, wrong: bool = False) -> str:
            if profile or wrong:
                told.append((profile, wrong))
                return ""
            return next(answers)

    device.edge = lambda address, with_token=True: Edge()  # type: ignore[assignment, method-assign]
    work = Work("a:1", "g", 1, 2, "j", 3, "b:1", "c:1", 4.0)

    async def scenario() -> None:
        asked = [await profiles.ask(work, key) for _ in range(5)]
        assert asked == [None, None, None, None, good]
        await profiles.tell(work, key, {**good, "choices": []}, None)
        assert told == []
        await profiles.tell(work, key, good, False)
        assert [wrong for _, wrong in told] == [True, False]

    asyncio.run(scenario())
    assert profiles.own(key) == good
    times["now"] = 31 * 86_400.0
    assert profiles.own(key) is None, "a month is its life"


def test_state_survives_and_damage_is_told(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "s")
    state = folder.load()
    state.work = Work("a:1", "g", 1, 2, "j", 3, "b:1", "c:1", 4.0, stage="planned")
    folder.save(state)
    assert folder.load() == state
    (tmp_path / "s" / "device.json").write_text("{")
    with pytest.raises(DataError, match="enrols anew"):
        folder.load()


def test_the_device_loads_no_ray() -> None:
    program = "import sys, jobs.device.join; print('ray' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=machine.app_root(),
        timeout=120,
    )
    assert done.stdout.strip() == "False"


def test_refusals_are_remote_errors() -> None:
    assert issubclass(PlanRefusedError, RemoteError)
    assert not issubclass(InfeasibleError, RemoteError)


def test_devices_leave_a_round_to_others_and_wait_longer_in_vain(tmp_path: Path) -> None:
    waits: list[float] = []
    agent = DeviceAgent(device_config(tmp_path, 0, "127.0.0.1:1", most_wait_s=30.0, rest_s=1.0))

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    agent.device.sleep = sleep  # type: ignore[method-assign]
    agent._pace_s = 7.0
    outcomes = [DONE, *[FAILED] * 8, DONE]

    async def scenario() -> None:
        for outcome in outcomes:
            await agent._rest(outcome)

    asyncio.run(scenario())
    assert (waits[0], waits[-1]) == (7.0, 7.0), "as long as the service lets devices wait"
    assert all(0.25 * 2**n <= wait <= min(2.0**n, 30.0) for n, wait in enumerate(waits[1:5], 1))
    assert all(7.5 <= wait <= 30.0 for wait in waits[5:-1]), "up to the longest wait"
    fleet = SimulatedFleet(SimulateConfig(count=2))
    fleet._pace_s = 7.0
    assert fleet._rest_s(0, DONE) == 7.0
    rests = [fleet._rest_s(0, FAILED) for _ in range(9)]
    assert 0.5 <= rests[0] <= 2.0
    assert 15.0 <= rests[-1] <= 60.0
    assert fleet._rest_s(0, DONE) == 7.0


def test_quiet_hours_keep_a_device_from_checking_in(tmp_path: Path) -> None:
    wishes = WillingnessConfig(quiet_hours="0-12,12-0")
    agent = DeviceAgent(device_config(tmp_path, 0, "127.0.0.1:1", willingness=wishes))
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    async def check_in() -> None:
        raise AssertionError("a device at rest calls nobody")

    agent.device.sleep = sleep  # type: ignore[method-assign]
    agent._check_in = check_in  # type: ignore[assignment, method-assign]
    asyncio.run(agent._once())
    assert agent.device.events[-1]["text"] == "quiet hours"
    assert 0 < waits[0] <= agent.device.config.idle_s


def test_two_devices_do_not_share_a_state_folder(tmp_path: Path) -> None:
    config = device_config(tmp_path, 0, "127.0.0.1:1")
    first, second = StateFolder(Path(config.state)), DeviceAgent(config)
    first.lock()
    with pytest.raises(StorageError, match="state folder of its own"):
        asyncio.run(second.run())
    first.unlock()
    first.unlock()
    second.stop()
    second.device.state.gateways, second.device.state.token_until_s = ["g:1"], 1e18
    assert asyncio.run(second.run()) == 0


def test_a_known_device_outlives_any_loss_of_network(tmp_path: Path) -> None:
    device = Device(device_config(tmp_path, 0, "127.0.0.1:1", retries=3))
    tries: list[int] = []

    async def sleep(seconds: float) -> None:
        assert seconds <= 10.0

    async def ask() -> str:
        tries.append(1)
        if len(tries) <= 50:
            raise RemoteError("server", "UNAVAILABLE: no route to host")
        return "back"

    device.sleep = sleep  # type: ignore[method-assign]
    with pytest.raises(RemoteError, match="no route"):
        asyncio.run(device.patiently("enrolment", ask, None))
    assert len(tries) == 3
    assert asyncio.run(device.patiently("enrolment", ask, None, endless=True)) == "back"
    tries.clear()
    device.stopped.set()
    with pytest.raises(RemoteError):
        asyncio.run(device.patiently("enrolment", ask, None, endless=True))
