"""The federated actors: plain calls without Ray, then workers and coordinators that are killed."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray

from actors.federated.driver import FederatedRun
from actors.federated.pool import Call, WorkerPool
from actors.federated.worker import WorkerActor
from actors.session import Session
from raysys.errors import ConfigError, RemoteError
from raysys.federated.core.datasets import FederatedData
from raysys.federated.core.model import FlatWeights, ModelSpec, initial_weights
from raysys.federated.core.population import Population
from raysys.federated.core.recipe import (
    FederatedConfig,
    ModelConfig,
    load_data,
    make_job,
    make_population,
)
from raysys.federated.core.runner import run_rounds
from raysys.runs import RunDirectory

RECIPE = FederatedConfig(seed=4, clients_per_round=60, model=ModelConfig(hidden=(16,)))
ROUNDS = 6


@pytest.fixture(scope="module")
def parts() -> tuple[FederatedData, Population, ModelSpec]:
    data = load_data(RECIPE.data, RECIPE.seed, None)
    return data, make_population(RECIPE, data), RECIPE.model.spec(data)


@pytest.fixture(scope="module")
def expected(parts: tuple[FederatedData, Population, ModelSpec]) -> FlatWeights:
    """What an undisturbed run in one process gives."""
    data, population, spec = parts
    job = make_job(RECIPE, spec, population)
    run_rounds(job, data.samples(), ROUNDS)
    return job.strategy.weights(0)


@pytest.fixture
def run_uri(tmp_path: Path) -> str:
    uri = str(tmp_path / "run")
    RunDirectory.create(uri, job="federate", config={}, seeds=[4], now="2026-01-01T00:00:00+00:00")
    return uri


def follow(run: FederatedRun) -> Iterator[int]:
    for summary in run.rounds(ROUNDS):
        yield summary.round_id


def test_worker_is_a_plain_class(parts: tuple[FederatedData, Population, ModelSpec]) -> None:
    data, population, spec = parts
    ticks = iter([1.0, 3.5])
    worker = WorkerActor(
        data.inputs, data.targets, data.test_inputs, data.test_targets, population,
        clock=lambda: next(ticks),
    )  # fmt: skip
    opened = make_job(RECIPE, spec, population).open_round()
    group = opened.groups[0]
    partial = worker.train(group.weights, group.tasks[0])
    assert partial.busy_s == 2.5
    assert opened.add(0, partial)
    score = worker.evaluate(initial_weights(spec, 0).values[None], spec, [1.0])
    assert 0 <= score.accuracy <= 1
    assert worker.health()["tasks"] == 1
    speed = worker.calibrate(group.weights, group.tasks[0])
    assert set(speed) == {"batched", "vmap", "loop"}
    worker.close()


def test_three_workers_give_the_same_bits_as_one_process(
    ray_session: Session,
    parts: tuple[FederatedData, Population, ModelSpec],
    expected: FlatWeights,
) -> None:
    run = FederatedRun(RECIPE, *parts, workers=3, worker_cpus=0, evaluate_every=3)
    summaries = list(run.rounds(ROUNDS))
    assert [s.round_id for s in summaries] == list(range(ROUNDS))
    assert [s.score is not None for s in summaries] == [False, False, True] * 2
    assert summaries[-1].spread is not None
    assert list(summaries[-1].spread.values()) == sorted(summaries[-1].spread.values())
    assert np.array_equal(run.weights(), expected)
    run.close()
    run.close()


def test_killed_workers_are_replaced_and_nothing_changes(
    ray_session: Session,
    parts: tuple[FederatedData, Population, ModelSpec],
    expected: FlatWeights,
) -> None:
    run = FederatedRun(RECIPE, *parts, workers=2, worker_cpus=0, slice_s=0.0)
    for round_id in follow(run):
        if round_id == 1:
            os.kill(run.health()["workers"][1]["pid"], signal.SIGKILL)
    assert np.array_equal(run.weights(), expected)
    assert run.health()["replaced"] == 1
    run.close()


def test_a_killed_coordinator_goes_on_from_its_checkpoint(
    ray_session: Session,
    parts: tuple[FederatedData, Population, ModelSpec],
    expected: FlatWeights,
    run_uri: str,
) -> None:
    run = FederatedRun(
        RECIPE, *parts, workers=1, worker_cpus=0, run_uri=run_uri, checkpoint_every=2, slice_s=0.0
    )
    seen = []
    for round_id in follow(run):
        seen.append(round_id)
        if round_id == 2 and run.restarts == 0:
            pid = run.health()["pid"]
            pending = run.actor.advance.remote(3, ROUNDS)
            os.kill(pid, signal.SIGKILL)
            # Mostly it dies in mid-round; on a busy machine it may have done them all by then.
            with contextlib.suppress(ray.exceptions.RayActorError):
                ray.get(pending)
    assert seen == list(range(ROUNDS))
    assert run.restarts == 1
    assert np.array_equal(run.weights(), expected)
    run.close()


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    ray_session: Session,
    parts: tuple[FederatedData, Population, ModelSpec],
    expected: FlatWeights,
    run_uri: str,
) -> None:
    options = {"workers": 1, "worker_cpus": 0, "run_uri": run_uri, "checkpoint_every": 2}
    run = FederatedRun(RECIPE, *parts, **options)
    assert len(list(run.rounds(4))) == 4
    run.close()
    files = sorted(Path(run_uri, "checkpoints").glob("*/state.arrow"))
    assert len(files) == 2
    files[-1].write_bytes(b"damaged")
    again = FederatedRun(RECIPE, *parts, **options)
    assert [s.round_id for s in again.rounds(ROUNDS, have=2)] == [2, 3, 4, 5]
    assert np.array_equal(again.weights(), expected)
    again.close()
    for file in Path(run_uri, "checkpoints").glob("*/state.arrow"):
        file.write_bytes(b"damaged")
    broken = FederatedRun(RECIPE, *parts, **options)
    with pytest.raises(RemoteError, match="damaged"):
        list(broken.rounds(ROUNDS, have=4))


def test_pool_passes_errors_on_and_gives_up_on_workers_that_keep_dying(
    ray_session: Session,
) -> None:
    class Fragile:
        def work(self, what: str) -> str:
            if what == "die":
                os._exit(1)
            if what == "raise":
                raise ConfigError("what", what, "something else")
            return str(os.getpid()) if what == "pid" else what

    remote = ray.remote(Fragile).options(num_cpus=0)
    pool = WorkerPool(remote.remote, 2, max_replacements=1)
    calls = [Call(n, "work", (f"w{n}",)) for n in range(9)]
    assert sorted(pool.run(calls)) == [(n, f"w{n}") for n in range(9)]
    with pytest.raises(ConfigError, match="something else"):
        list(pool.run([Call(0, "work", ("raise",))]))
    one_by_one = [next(pool.run([Call(0, "work", ("pid",))]))[1] for _ in range(4)]
    assert one_by_one[:2] == one_by_one[2:]
    assert len(set(one_by_one)) == 2
    with pytest.raises(RemoteError, match="workers died"):
        list(pool.run([Call(0, "work", ("die",))]))
    assert pool.replaced == 1
    pool.close()
    pool.close()
