"""A device that is steered from outside: plans, trainings, commands, and what it refuses."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_parts import MODEL, PLAN, QUIET, device_config

from actors.edge import control as module
from actors.edge.control import DeviceControl
from actors.edge.steering import SwanDeviceClient
from actors.edge.trainer import Progress, train_plan
from actors.proto.swan_messages import pb
from actors.swan.engine import Swan
from actors.venn.security import SecurityConfig, TokenAuthority
from raysys.errors import InterruptedRunError, RemoteError
from raysys.federated.core.model import initial_weights
from raysys.federated.swan.plans import plan_to_json
from raysys.federated.swan.willingness import WillingnessConfig

WEIGHTS = initial_weights(PLAN.spec, 0).values
SHORT = dataclasses.replace(PLAN, local=dataclasses.replace(PLAN.local, steps=5))
Scenario = Callable[[DeviceControl, SwanDeviceClient], Coroutine[Any, Any, None]]


def steer(folder: Path, scenario: Scenario, token: str = "", **more: Any) -> DeviceControl:
    """Run a scenario against a device that listens."""

    async def run() -> DeviceControl:
        control = DeviceControl(device_config(folder, 0, "127.0.0.1:1", **more))
        end = f"127.0.0.1:{await control.start()}"
        try:
            async with SwanDeviceClient(end, SecurityConfig(token=token)) as client:
                await scenario(control, client)
        finally:
            await control.close()
            await control.close()
        return control

    return asyncio.run(run())


def test_a_steered_device_trains_and_knows_the_cost_afterwards(tmp_path: Path) -> None:
    seen: list[Any] = []

    async def scenario(control: DeviceControl, client: SwanDeviceClient) -> None:
        before = await client.plan(SHORT)
        assert (before.local_steps, list(before.frontier), before.refusal) == (5, [], "")
        delta, facts = await client.train(SHORT, WEIGHTS, seen.append)
        straight = train_plan(SHORT, WEIGHTS, control.samples)
        assert np.allclose(delta, straight.delta, atol=1e-6)
        assert facts["steps"] == 5
        assert not list((tmp_path / "device-0" / module.FOLDER).glob("*")), "nothing is left"
        status = await client.control("status")
        assert json.loads(status.state) == {"training": False}
        nothing = await client.control("pause")
        assert (nothing.accepted, nothing.reason) == (False, "nothing trains")
        shared = {"schema": 1, "device": control.profiles.kind}
        shared["choices"] = [{"counts": [1], "seconds": 0.5, "joules": 2.0}]
        assert (await client.share_profile(before.key, shared)).accepted
        told = await client.plan(SHORT)
        assert [place.threads for place in told.frontier][-1] == 1
        elsewhere = {**shared, "choices": [{"counts": [1, 2, 3, 4, 5], "seconds": 0.5}]}
        for bad in ({**shared, "device": "other"}, {**shared, "schema": 9}, elsewhere):
            with pytest.raises(RemoteError, match="INVALID_ARGUMENT"):
                await client.share_profile(before.key, bad)

    control = steer(tmp_path, scenario)
    assert seen[-1].update_sha256
    assert control.trained == 1


def test_a_steered_device_refuses_bad_plans_and_models(tmp_path: Path) -> None:
    async def scenario(control: DeviceControl, client: SwanDeviceClient) -> None:
        bad = [
            pb.TrainRequest(plan="{", model=MODEL),
            pb.TrainRequest(plan='{"format":1,"architecture":"exec"}', model=MODEL),
            pb.TrainRequest(plan=plan_to_json(SHORT), model=b"\x80\x04cos\nsystem\n."),
            pb.TrainRequest(plan=plan_to_json(SHORT), model=b""),
        ]
        for request in bad:
            with pytest.raises(Exception, match=r"INVALID_ARGUMENT|refused"):
                async for _ in client._stub.Train(request):
                    pass
        with pytest.raises(Exception, match=r"not JSON|INVALID_ARGUMENT"):
            await client._stub.Plan(pb.PlanQuery(plan="?"))
        for text in ("[", "[]", "x" * 70_000):
            with pytest.raises(Exception, match=r"profile|JSON"):
                await client._stub.ShareProfile(pb.SharedProfile(key="k", profile=text))
        assert (await client.train(SHORT, WEIGHTS))[1]["steps"] == 5, "it lives on"

    steer(tmp_path, scenario)


def test_a_training_is_paused_resumed_and_stopped_from_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(*_: Any, engine: Swan, stopped: Any, progress: Progress, **__: Any) -> None:
        with engine.training() as task:
            task.stopped = stopped.is_set
            while not stopped.is_set():
                progress.step += 1
                task.step_end()
                time.sleep(0.005)
        raise InterruptedRunError("told to stop")

    async def until(client: SwanDeviceClient, **wanted: Any) -> dict[str, Any]:
        for _ in range(6000):
            state = json.loads((await client.control("status")).state)
            if all(state.get(name) == value for name, value in wanted.items()):
                return dict(state)
            await asyncio.sleep(0.01)
        raise AssertionError(f"never {wanted}")

    async def scenario(control: DeviceControl, client: SwanDeviceClient) -> None:
        seen: list[Any] = []
        training = asyncio.create_task(client.train(SHORT, WEIGHTS, seen.append))
        await until(client, training=True, paused=False)
        with pytest.raises(RemoteError, match=r"FAILED_PRECONDITION.*trains already"):
            await client.train(SHORT, WEIGHTS)
        assert (await client.control("pause")).accepted
        await until(client, paused=True)
        assert (await client.control("resume")).accepted
        await until(client, paused=False)
        await client.control("pause")
        assert (await client.control("stop")).accepted, "a paused training stops as well"
        with pytest.raises(RemoteError, match=r"FAILED_PRECONDITION.*was stopped"):
            await training
        await until(client, training=False)
        monkeypatch.undo()
        assert (await client.train(SHORT, WEIGHTS))[1]["steps"] == 5

    monkeypatch.setattr(module, "train_plan", endless)
    steer(tmp_path, scenario, engine=dataclasses.replace(QUIET, sample_s=0.02))


def test_a_caller_who_hangs_up_ends_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[bool] = []

    def waiting(*_: Any, stopped: Any, **__: Any) -> None:
        ended.append(stopped.wait(120))
        raise InterruptedRunError("nobody waits")

    async def scenario(control: DeviceControl, client: SwanDeviceClient) -> None:
        training = asyncio.create_task(client.train(SHORT, WEIGHTS))
        while control._running is None or control._running.engine is None:
            await asyncio.sleep(0.01)
        training.cancel()
        while control._running is not None:
            await asyncio.sleep(0.01)

    monkeypatch.setattr(module, "train_plan", waiting)
    steer(tmp_path, scenario)
    assert ended == [True]


def test_the_owners_wishes_and_tokens_hold(tmp_path: Path) -> None:
    async def unwilling(control: DeviceControl, client: SwanDeviceClient) -> None:
        assert (await client.plan(SHORT)).refusal == "quiet hours"
        with pytest.raises(RemoteError, match=r"FAILED_PRECONDITION.*quiet hours"):
            await client.train(SHORT, WEIGHTS)

    wishes = WillingnessConfig(quiet_hours="0-12,12-0")
    steer(tmp_path, unwilling, willingness=wishes)
    (tmp_path / "secret").write_text("s" * 40)
    security = SecurityConfig(token_secret=str(tmp_path / "secret"))
    authority = TokenAuthority(b"s" * 40)

    async def stranger(control: DeviceControl, client: SwanDeviceClient) -> None:
        with pytest.raises(RemoteError, match=r"UNAUTHENTICATED|PERMISSION_DENIED"):
            await client.plan(SHORT)

    async def known(control: DeviceControl, client: SwanDeviceClient) -> None:
        assert (await client.plan(SHORT)).local_steps == 5

    steer(tmp_path, stranger, security=security)
    device = authority.issue("d", "device", time.time(), 60.0)
    steer(tmp_path, stranger, token=device, security=security)
    job = authority.issue("j", "job", time.time(), 60.0)
    steer(tmp_path, known, token=job, security=security)


def test_stopped_trainings_do_not_pile_up(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"old-{number}").mkdir()
        os.utime(tmp_path / f"old-{number}", (number, number))
    module._forget_old(tmp_path / "old-0")
    left = sorted(path.name for path in tmp_path.glob("*"))
    assert left == ["old-0", "old-3", "old-4", "old-5"], "the one asked for, and the newest others"


def test_a_stopped_training_resumes_at_its_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[int] = []

    def stop_after_two(*given: Any, progress: Progress, **more: Any) -> Any:
        class Stop:
            def is_set(self) -> bool:
                return progress.step >= 2

        return train_plan(*given, progress=progress, **{**more, "stopped": Stop()})

    def noted(*given: Any, folder: Path, **more: Any) -> Any:
        files = sorted(path.name for path in folder.glob("step-*.swan"))
        began.append(int(files[-1].removeprefix("step-").removesuffix(".swan")))
        return train_plan(*given, folder=folder, **more)

    async def scenario(control: DeviceControl, client: SwanDeviceClient) -> None:
        monkeypatch.setattr(module, "train_plan", stop_after_two)
        with pytest.raises(RemoteError, match="was stopped"):
            await client.train(SHORT, WEIGHTS)
        monkeypatch.setattr(module, "train_plan", noted)
        delta, facts = await client.train(SHORT, WEIGHTS)
        assert (began, facts["steps"]) == ([2], 5)
        assert np.allclose(delta, train_plan(SHORT, WEIGHTS, control.samples).delta, atol=1e-6)

    steer(tmp_path, scenario)
