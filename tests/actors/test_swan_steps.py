"""Steps of a training that cannot be taken as they come: out of memory, and cut into parts."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Collection

import numpy as np
import pytest
import torch
from edge_parts import PLAN, RECIPE
from torch import nn

from actors.edge.config import SamplesConfig
from actors.edge.trainer import train_plan
from actors.swan.affinity import Applied
from actors.swan.engine import EngineConfig, Swan
from actors.swan.memory import out_of_memory
from actors.swan.sensors import SleepWatch
from actors.swan.task import TrainingTask
from raysys.errors import ConfigError, InfeasibleError
from raysys.federated.core.model import initial_weights
from raysys.federated.swan.choices import Choice
from raysys.federated.swan.pilot import Pilot, Policy
from raysys.federated.swan.topology import Cluster, Topology

TWO_CORES = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")


def exhausted() -> torch.Tensor:
    """Ask torch for more memory than there is address space."""
    return torch.empty(2**60, dtype=torch.uint8)


def host_pair() -> Topology:
    return Topology(clusters=(Cluster(cores=tuple(sorted(os.sched_getaffinity(0))[:2])),))


def config(**policy: object) -> EngineConfig:
    return EngineConfig(policy=Policy(**policy), nice=0, sample_s=30.0)  # type: ignore[arg-type]


def test_torch_says_that_memory_ran_out() -> None:
    with pytest.raises(RuntimeError) as caught:
        exhausted()
    assert out_of_memory(caught.value)
    assert out_of_memory(MemoryError())
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@TWO_CORES
def test_out_of_memory_costs_the_choice_and_not_the_training() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[tuple[int, float]] = []

    def work() -> float:
        drawn = float(torch.rand(1))
        seen.append((torch.get_num_threads(), drawn))
        model(torch.ones(3, 4)).sum().backward()
        if torch.get_num_threads() > 1:
            exhausted()
        return drawn

    with Swan(config(), topology=host_pair()) as swan:
        with swan.training(optimizer=optimizer, model=model) as task:
            swan.force(Choice((2,), swan.topology.cores))
            swan.pilot.choice = Choice((2,), swan.topology.cores)
            task.attempt(work)
            once = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            optimizer.step()
            assert [threads for threads, _ in seen] == [2, 1]
            assert seen[0][1] == seen[1][1], "the same random numbers again"
            assert task.steps == 1
        assert [c.threads for c in swan.pilot.profile.usable()] == [1]
        assert any("out of memory on 2 threads" in event["reason"] for event in swan.events)
        assert len(once) == 4
        with (
            swan.training(optimizer=optimizer) as task,
            pytest.raises(InfeasibleError, match="smaller batch"),
        ):
            task.attempt(exhausted)
        with swan.training() as task, pytest.raises(RuntimeError, match="unrelated"):
            task.attempt(lambda: (_ for _ in ()).throw(RuntimeError("unrelated")))


def test_gradients_of_a_failed_step_do_not_count() -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    failures = iter([True, False])

    def work() -> None:
        weight.sum().backward()
        if next(failures):
            raise MemoryError

    pair = Topology(clusters=(Cluster(cores=(0, 1)),))
    pilot = Pilot(pair)
    pilot.choice = pilot.profile.choices[-1]
    with Swan(config(kind="fixed")) as swan:
        swan.pilot = pilot
        with swan.training(optimizer=optimizer) as task:
            task.attempt(work)
            assert weight.grad is not None
            assert float(weight.grad) == 1.0


def test_smaller_choices_only_and_none_left_is_said() -> None:
    pilot = Pilot(Topology(clusters=(Cluster(cores=(0, 1), speed=0.5), Cluster(cores=(2, 3, 4)))))
    by_threads = {c.threads: c for c in pilot.profile.choices if c.counts[0] == 0}
    pilot.choice = by_threads[2]
    change = pilot.drop_larger("out of memory", 0.0)
    assert change is not None
    assert change.choice is not None
    assert {c.threads for c in pilot.profile.usable()} == {1}
    assert pilot.exploring
    assert pilot.drop_larger("out of memory", 0.0) is None
    with Swan(config(deterministic=True)) as swan, pytest.raises(InfeasibleError):
        swan.out_of_memory("the thread count is not ours to change")


def test_micro_batches_add_up_to_the_step() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    inputs = torch.randn(10, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found: list[torch.Tensor] = []
    for strict in (False, True):
        with (
            Swan(config(kind="fixed", strict=strict, parts=3)) as swan,
            swan.training(optimizer=optimizer) as task,
        ):
            optimizer.zero_grad()
            parts = list(task.micro_batches(10))
            assert [p.stop - p.start for p in parts] == ([3, 3, 4] if strict else [10])
            assert len(list(task.micro_batches(2))) == (2 if strict else 1)
            for part in parts:
                (model(inputs[part]).square().sum() / 10).backward()
            assert model.weight.grad is not None
            found.append(model.weight.grad.clone())
    assert torch.allclose(*found, atol=1e-6)
    with pytest.raises(ConfigError, match="parts"):
        Policy(parts=0)


@TWO_CORES
def test_a_strict_step_moves_and_pauses_between_its_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = threading.Event()
    with (
        Swan(config(kind="greedy", strict=True, parts=2), topology=host_pair()) as swan,
        swan.training() as task,
    ):
        parts = task.micro_batches(4)
        next(parts)
        assert torch.get_num_threads() == 2
        hold = swan.hold

        def watched(on_pause: Callable[[], None], stopped: Callable[[], bool]) -> None:
            assert swan._paused()
            held.set()
            hold(on_pause, stopped)
            assert not swan._paused()

        monkeypatch.setattr(swan, "hold", watched)
        with swan._guard:  # what the watcher does when the owner comes back
            core = swan.topology.cores[0]
            swan.pilot.choice, swan._applied = Choice((1,), (core,)), (core,)
        swan.pause()
        owner = threading.Thread(target=lambda: (held.wait(60), swan.resume()))
        owner.start()
        next(parts)
        owner.join()
        monkeypatch.undo()
        assert held.is_set(), "half a step waited"
        assert torch.get_num_threads() == 1, "the second half runs on fewer threads"


def test_edge_training_in_parts_learns_the_same() -> None:
    samples = SamplesConfig(split=RECIPE.partition).load()
    local = dataclasses.replace(PLAN.local, steps=3, batch_size=32)
    plan = dataclasses.replace(PLAN, local=local)
    weights = initial_weights(plan.spec, 0).values
    whole = train_plan(plan, weights, samples)
    with Swan(config(kind="fixed", strict=True, parts=4)) as engine:
        parts = train_plan(plan, weights, samples, engine=engine)
    assert np.allclose(whole.delta, parts.delta, atol=1e-6)
    assert parts.facts["loss_last"] == pytest.approx(whole.facts["loss_last"], abs=1e-5)


def test_refused_affinity_is_told_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []

    def refuse(cores: Collection[int], root: object = None) -> Applied:
        calls.append(tuple(cores))
        return Applied(0, ((1, "Operation not permitted"),))

    monkeypatch.setattr("actors.swan.engine.apply_affinity", refuse)
    eight = Topology(clusters=(Cluster(cores=tuple(range(8))),))
    with Swan(config(), topology=eight) as swan, swan.training() as task:
        assert len(calls) < 20, "it does not try for ever"
        assert any("affinity refused" in event["reason"] for event in swan.events)
        task.step_end()
        assert task.steps == 1
        assert len(swan.pilot.profile.usable()) == 1


def test_one_task_at_a_time() -> None:
    with Swan(config(kind="fixed")) as swan:
        with (
            swan.training(),
            pytest.raises(InfeasibleError, match="a second task"),
            swan.training(),
        ):
            pass
        with swan.training() as task:
            assert task.steps == 0, "the first has ended"


def test_a_step_across_a_sleep_does_not_count() -> None:
    clocks = iter([(10.0, 5.0), (11.0, 6.0), (100.0, 7.0), (101.0, 8.0)])
    watch = SleepWatch(lambda: next(clocks))
    assert [watch.read() for _ in range(3)] == [0.0, 88.0, 0.0]
    assert SleepWatch().read() == 0.0
    with Swan(config(kind="greedy")) as swan:
        swan.step_end(0.1)  # the first has seen the start
        swan.step_end(0.1)
        assert swan.pilot.steps == 1
        sleeps = iter([(0.0, 0.0), (60.0, 0.0), (60.0, 0.0)])
        swan._sleep = SleepWatch(lambda: next(sleeps))
        swan.step_end(60.0)
        assert swan.pilot.steps == 1
        assert swan.events[-1]["kind"] == "sleep"
        swan.step_end(0.1)
        assert swan.pilot.steps == 2


def test_a_day_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.swan.engine.REPORT_S", 0.01)
    told = threading.Event()

    def note(event: dict[str, object]) -> None:
        if event["kind"] == "report":
            told.set()

    policy = Policy(kind="fixed")
    engine = EngineConfig(policy=policy, nice=0, sample_s=0.01)
    with Swan(engine, on_event=note) as swan:
        swan.pause()
        assert told.wait(60)
        assert any("paused for" in event["reason"] for event in swan.events)


def test_short_steps_are_added_up_and_sizes_are_divided_out() -> None:
    seen: list[tuple[float, int]] = []

    class Engine:
        config = EngineConfig(min_step_s=1.0)

        def step_end(self, seconds: float, steps: int) -> None:
            seen.append((seconds, steps))

        def hold(self, *_: object) -> None:
            return None

    now = {"s": 0.0}
    task = TrainingTask(Engine(), {}, None, 60.0, lambda: now["s"])  # type: ignore[arg-type]
    for _ in range(5):
        now["s"] += 0.25
        task.step_end()
    assert seen == [(0.25, 4)], "four steps of a quarter are one measurement"
    seen.clear()
    task = TrainingTask(Engine(), {}, None, 60.0, lambda: now["s"])  # type: ignore[arg-type]
    for tokens in (100, 300):
        now["s"] += 0.02 * tokens
        task.step_end(samples=tokens)
    assert [round(seconds, 9) for seconds, _ in seen] == [0.02, 0.02], "per token"
