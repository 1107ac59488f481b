"""The edge plane with a real Venn: devices train, a hostile server is refused, leases resume."""

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

from actors.edge.agent import DeviceAgent
from actors.edge.certificates import make_certificates
from actors.edge.client import EdgeClient
from actors.edge.config import EdgeDeviceConfig, SamplesConfig
from actors.edge.device import Device
from actors.edge.job import EdgeJobConfig
from actors.edge.profiles import Profiles
from actors.edge.registry import Registry
from actors.edge.server import EdgeServer, EdgeServerConfig
from actors.edge.service import EdgeService, VennConfig
from actors.edge.simulated import SimulateConfig, SimulatedFleet
from actors.edge.state import StateFolder, Work
from actors.edge.trainer import train_plan
from actors.proto.edge_messages import pb, rpc
from actors.swan.engine import EngineConfig
from actors.venn.security import SecurityConfig
from raysys import machine
from raysys.errors import ConfigError, DataError, InfeasibleError, RemoteError
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.model import Mlp, ModelSpec, initial_weights
from raysys.federated.core.partition import PartitionConfig
from raysys.federated.core.recipe import (
    FederatedConfig,
    load_data,
    make_job,
    make_line,
    make_population,
)
from raysys.federated.core.runner import run_rounds
from raysys.federated.swan.pilot import Policy
from raysys.federated.swan.plans import Plan, PlanRefusedError, pack_weights, plan_to_json
from raysys.federated.venn.scheduler_state import ServiceConfig

CLIENTS = 3
RECIPE = FederatedConfig(
    clients_per_round=CLIENTS,
    partition=PartitionConfig(clients=CLIENTS, scheme="iid"),
    local=LocalConfig(epochs=1, batch_size=32, lr=0.1),
)
QUIET = EngineConfig(nice=0, sample_s=5.0, policy=Policy(kind="fixed"))


def device_config(folder: Path, number: int, server: str, **more: Any) -> EdgeDeviceConfig:
    samples = SamplesConfig(client=number, split=RECIPE.partition)
    values: dict[str, Any] = {
        "server": server, "code": "c", "state": str(folder / f"device-{number}"),
        "most_wait_s": 0.1, "rest_s": 0.05, "timeout_s": 5.0, "samples": samples, "engine": QUIET,
        "attributes": {"cpu": 5.0, "mem": 1000.0, "os": 12.0},
    }  # fmt: skip
    return EdgeDeviceConfig(**{**values, **more})


def venn_config(folder: Path) -> VennConfig:
    return VennConfig(
        folder=str(folder / "venn"),
        gateway_address="127.0.0.1:0",
        service=ServiceConfig(low_retry_s=0.05, high_retry_s=0.1, report_interval_s=0.05),
    )


def identities(folder: Path) -> tuple[SecurityConfig, SecurityConfig]:
    """Mutual TLS and tokens, for the service and for a device."""
    pem = make_certificates(folder / "pem", ["127.0.0.1"], ["device"], days=1)
    (folder / "secret").write_text("s" * 40)
    authority = str(pem / "authority.pem")
    service = SecurityConfig(
        certificate=str(pem / "server.pem"), key=str(pem / "server.key"), authority=authority,
        mutual=True, token_secret=str(folder / "secret"),
    )  # fmt: skip
    device = SecurityConfig(
        certificate=str(pem / "device.pem"), key=str(pem / "device.key"), authority=authority
    )
    return service, device


def test_devices_learn_what_the_simulation_learns(tmp_path: Path) -> None:
    data = load_data(RECIPE.data, RECIPE.seed, None)
    spec = RECIPE.model.spec(data)
    simulated = make_job(RECIPE, spec, make_population(RECIPE, data))
    run_rounds(simulated, data.samples(), 2)
    service_side, device_side = identities(tmp_path)

    async def scenario() -> np.ndarray[Any, Any]:
        server = EdgeServerConfig(code="c", security=service_side, folder=str(tmp_path / "edge"))
        service = EdgeService(venn_config(tmp_path), server, CLIENTS, time.time())
        address = await service.start("127.0.0.1:0")
        line = make_line(RECIPE, spec)
        config = EdgeJobConfig(job_id="j", clients_per_round=CLIENTS, deadline_s=30)
        job = service.add(config, line, RECIPE.seed, "127.0.0.1")
        agents = [
            DeviceAgent(device_config(tmp_path, n, address, security=device_side))
            for n in range(CLIENTS)
        ]
        runs = [asyncio.create_task(agent.run()) for agent in agents]
        await job.run(2)
        for agent in agents:
            agent.stop()
        updates = await asyncio.gather(*runs)
        await service.close()
        assert sum(updates) == 2 * CLIENTS
        assert all(agent.device.state.token for agent in agents)
        assert all(agent.device.state.sample_ms > 0 for agent in agents)
        return line.weights(0)

    real = asyncio.run(scenario())
    assert np.allclose(real, simulated.strategy.weights(0), atol=2e-5)


def test_fleet_of_modelled_devices_in_one_process(tmp_path: Path) -> None:
    recipe = dataclasses.replace(
        RECIPE, clients_per_round=8, partition=PartitionConfig(clients=20, scheme="iid")
    )
    data = load_data(recipe.data, recipe.seed, None)

    async def scenario() -> None:
        config = EdgeServerConfig(code="c")
        service = EdgeService(venn_config(tmp_path), config, 20, time.time())
        address = await service.start("127.0.0.1:0")
        line = make_line(recipe, recipe.model.spec(data))
        settings = EdgeJobConfig(job_id="j", clients_per_round=8, deadline_s=30)
        job = service.add(settings, line, recipe.seed, "127.0.0.1")
        samples = SamplesConfig(split=recipe.partition)
        fleet = SimulatedFleet(
            SimulateConfig(
                server=address, code="c", count=20, updates=8, duration_s=20, samples=samples
            )
        )
        report, _ = await asyncio.gather(fleet.run(), job.run(1))
        await service.close()
        assert report.enrolled == 20
        assert report.accepted >= 8
        assert report.modelled_s > 0
        assert job.reports[0].counts["ok"] == 8

    asyncio.run(scenario())


PLAN = Plan(spec=ModelSpec(architecture=Mlp(sizes=(64, 10))), local=LocalConfig(), client=0)
MODEL = pack_weights(initial_weights(PLAN.spec, 0).values)


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
            await asyncio.wait_for(agent.errand.run(work), 30)
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

    async def renew(self, epoch: int, leases: list[int]) -> list[float]:
        return [60.0]


def test_uploads_resume_and_strangers_are_turned_away(tmp_path: Path) -> None:
    async def scenario() -> None:
        server = EdgeServer(EdgeServerConfig(code="c"), clients=2)
        end = f"127.0.0.1:{await server.start()}"
        work = Work(end, "g", 1, 5, "nobody", 0, end, end, time.time() + 60, nonce="00")
        async with EdgeClient(end, b"d" * 16) as client:
            with pytest.raises(RemoteError, match="has not enrolled"):
                await client.upload(work, b"x")
            with pytest.raises(RemoteError, match="enrolment code"):
                await client.enrol("wrong", "{}")
            await client.enrol("c", '{"client": 1, "sample_ms": 2.0}')
            with pytest.raises(RemoteError, match="it is not here"):
                await client.upload(work, b"x")
            profile = {"schema": 1, "device": "x", "choices": [{"counts": [1], "seconds": 1.0}]}
            assert await client.share_profile("x|k", json.dumps(profile)) == ""
            broken = {**profile, "choices": [{"counts": [1], "seconds": -1.0}]}
            with pytest.raises(RemoteError, match="a positive time"):
                await client.share_profile("x|k", json.dumps(broken))
            for name in (b"e", b"f"):
                async with EdgeClient(end, name * 16) as other:
                    if name == b"e":
                        await other.enrol("c", "{}")
                    else:
                        with pytest.raises(RemoteError, match="places are taken"):
                            await other.enrol("c", "{}")
        assert server.registry.mean_sample_ms == 2.0
        held = server._resume(("g", 1, 5), 100)
        held += b"part"
        assert server._resume(("g", 1, 5), 100) == b"part"
        with pytest.raises(ConfigError, match="total_bytes"):
            server._resume(("g", 1, 5), 2**50)
        await server.close()

    asyncio.run(scenario())


def test_registry_keeps_its_devices(tmp_path: Path) -> None:
    first = Registry("c", 2, folder=str(tmp_path))
    first.enrol(b"a" * 16, "c", '{"client": 1}', 0.0)
    again = Registry("c", 2, folder=str(tmp_path))
    assert again.client_of(b"a" * 16) == 1
    again.enrol(b"a" * 16, "c", "{}", 0.0)
    assert again.client_of(b"a" * 16) == 1, "enrolling again keeps the number"
    for device, code, text in (
        (b"short", "c", "{}"),
        (b"b" * 16, "x", "{}"),
        (b"b" * 16, "c", "["),
        (b"b" * 16, "c", "x" * 5000),
    ):
        with pytest.raises(ConfigError):
            again.enrol(device, code, text, 0.0)
    kept = tmp_path / "devices.jsonl"
    kept.write_text(kept.read_text() + '{"id": "torn')
    mended = Registry("c", 2, folder=str(tmp_path))
    assert mended.client_of(b"a" * 16) == 1
    mended.enrol(b"e" * 16, "c", '{"client": "x", "sample_ms": "y"}', 0.0)
    assert Registry("c", 2, folder=str(tmp_path)).client_of(b"e" * 16) == 0
    kept.write_text('{"id": "torn\n' + kept.read_text())
    with pytest.raises(DataError, match="line 1"):
        Registry("c", 2, folder=str(tmp_path))


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
