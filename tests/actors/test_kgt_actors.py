"""Reference and controller actors: direct calls, then kills and stops on a real cluster."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.kgt import (
    MAX_FAILURES,
    ControllerActor,
    ReferenceActor,
    RemoteControl,
    Snapshot,
    View,
    start_remote_control,
)
from actors.session import Session
from raysys.errors import ConfigError
from raysys.training.kgt import KGTConfig, ModulePlan, parse
from raysys.training.kgt.decision import Decision, Offer
from raysys.training.kgt.loop import Recipe, TrainData, TrainLoop
from raysys.training.kgt.models import ResNet
from raysys.training.kgt.plasticity import gram

GROUPING = [["stem.0", "stem.1", "blocks.0"], ["blocks.1"], ["head"]]
CONFIG = KGTConfig(
    window=2, every=2, bootstrap_window=2, bootstrap_rate=10.0, min_bootstrap_share=0,
    reference="fp32", coef=5.0, gram_rows=8,
)  # fmt: skip


def examples() -> TrainData:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 1, 16)).astype(np.float32)
    return TrainData(torch.from_numpy(x), torch.from_numpy(rng.integers(0, 2, 64)), np.arange(64))


def network() -> tuple[ResNet, ModulePlan]:
    torch.manual_seed(0)
    model = ResNet(2, widths=(4, 8), dimensions=1)
    return model, parse(model, (examples().x[:8],), signature=GROUPING)


def offer_of(plan: ModulePlan, step: int = 4) -> Offer:
    x = examples().x[:8]
    segment = plan.modules[0].segment
    assert segment is not None
    with torch.no_grad():
        out = segment(None, x)
    return Offer(step, 0.1, (x,), 0, {0: gram(out)})


def test_reference_evaluates_against_its_snapshot() -> None:
    _, plan = network()
    actor = ReferenceActor.__new__(ReferenceActor)  # without lowering this process's priority
    actor.precision, actor.window, actor.evaluations, actor._reference = "fp32", 2, 0, None
    offer = offer_of(plan)
    assert actor.evaluate(offer) is None
    assert not actor.health()["ready"]
    segment = plan.modules[0].segment
    assert segment is not None
    assert actor.snapshot(Snapshot({0: segment}, None, {}, offer)) == "fp32"
    losses = actor.evaluate(offer)
    assert losses is not None
    assert losses[0] is not None
    assert 0 <= losses[0] < 1
    actor.close()
    actor.close()
    assert actor.evaluate(offer) is None


def events(steps: range) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    for step in steps:
        found.append(("step", step, 1.0, 0.1, 0))
        found.append(("read", step, {0: 1.0}, 0.1, 0))
    return found


def test_controller_decides_takes_a_batch_once_and_restarts_from_its_state(tmp_path: Path) -> None:
    path = str(tmp_path / "state.pkl")
    actor = ControllerActor(CONFIG, 3, 1000, state_path=path)
    first = actor.exchange(1, events(range(3)))
    assert first.decision.frozen_upto == 0
    assert actor.exchange(1, events(range(3, 40))) == first
    second = actor.exchange(2, events(range(3, 7)))
    restarted = ControllerActor(CONFIG, 3, 1000, state_path=path)
    assert restarted.view() == second
    assert second.wanted == (second.decision.frozen_upto,)
    third = actor.exchange(3, events(range(7, 20)))
    assert third.decision == second.decision
    assert restarted.exchange(3, events(range(7, 20))) == third
    with pytest.raises(ConfigError, match="'step', 'read' or 'refreshed'"):
        actor.exchange(4, [("else",)])


def until(condition: Callable[[], bool], loop: TrainLoop, limit_s: float = 90.0) -> None:
    """Train until a condition holds."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        loop.run(until=loop.step + 10)


@pytest.fixture
def remote(ray_session: Session) -> Any:
    model, plan = network()
    control = start_remote_control(CONFIG, model, plan, 10_000_000)
    recipe = Recipe(epochs=1_000_000, batch_size=8, schedule="constant", lr=1e-3)
    loop = TrainLoop(
        model, examples(), recipe, CONFIG, plan=plan, control=lambda plan, steps: control
    )
    yield control, loop
    loop.close()


def test_training_freezes_by_actors_and_survives_kills_and_a_stop(remote: Any) -> None:
    import ray

    control: RemoteControl = remote[0]
    loop: TrainLoop = remote[1]
    until(lambda: ray.get(control._controller.health.remote())["stage"] == "guided", loop)
    pid = ray.get(control._controller.health.remote())["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        before = loop.step
        loop.run(until=before + 200)  # the controller answers nothing; training does not wait
        assert loop.step == before + 200
        backlog = len(control._events)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert backlog >= 150
    until(lambda: loop.kgt.frozen_upto > 0, loop)
    ray.kill(control._reference, no_restart=False)
    ray.kill(control._controller, no_restart=False)
    frozen = loop.kgt.frozen_upto
    loop.run(until=loop.step + 50)
    assert loop.kgt.frozen_upto >= frozen
    assert control.disabled_reason == ""


def test_repeated_failures_disable_freezing_and_release_nothing() -> None:
    model, plan = network()
    control = RemoteControl(None, None, CONFIG, model, plan)
    for _ in range(MAX_FAILURES):
        control._failed("the reference failed: gone\nlong trace")
    assert control.disabled_reason == "the reference failed: gone"
    assert control.wants(0) == ()
    assert not control.offer(offer_of(plan))
    control.observe(9, 1.0, 0.1, 0)
    assert control.latest().version == 0
    control.close()


def test_a_slow_reference_stretches_the_interval_and_is_counted() -> None:
    model, plan = network()
    control = RemoteControl(None, None, CONFIG, model, plan)
    control._view = View(Decision(), (0,), False, 0)
    control._evaluating = (offer_of(plan), None)  # still under way
    due = [CONFIG.every, CONFIG.every, 2 * CONFIG.every]  # two forward passes of one step
    assert [control.wants(step) for step in due] == [()] * 3
    assert control.skipped == 2
    control._evaluating = None
    assert control.wants(3 * CONFIG.every) == (0,)
    assert control.skipped == 2
    control.close()
