"""Workers, combiners and coordinator killed at random in mid-round: the weights are as without."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import ray

from actors.federated.driver import FederatedRun
from actors.session import Session
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.messages import ScreenConfig
from raysys.federated.core.recipe import (
    ExecutionConfig,
    FederatedConfig,
    ModelConfig,
    load_data,
    make_job,
    make_population,
)
from raysys.federated.core.runner import run_rounds
from raysys.runs import RunDirectory

ROUNDS = 5
RECIPE = FederatedConfig(
    seed=6,
    clients_per_round=60,
    model=ModelConfig(hidden=(16,)),
    local=LocalConfig(epochs=12),
    execution=ExecutionConfig(task_clients=5, chunk_size=5),
    screen=ScreenConfig(),
)


class Killer(threading.Thread):
    """Kills a random worker, or the coordinator, some way into each of the next rounds."""

    def __init__(self, run: FederatedRun, seed: int, roles: tuple[str, ...], round_s: float):
        super().__init__(daemon=True)
        self._roles = roles
        self._run = run
        self._round_s = round_s
        self._random = random.Random(seed)
        self._begun = threading.Semaphore(0)
        self.killed: list[str] = []

    def run(self) -> None:
        for role in self._roles:
            self._begun.acquire()
            time.sleep(self._random.uniform(0.0, self._round_s))
            try:  # not through the run: that would replace the dead from two threads at once
                facts = ray.get(self._run.actor.health.remote())
            except ray.exceptions.RayActorError:
                continue  # it is just being replaced
            pids = [worker["pid"] for worker in facts["workers"]]
            os.kill(self._random.choice(pids) if role == "worker" else facts["pid"], signal.SIGKILL)
            self.killed.append(role)

    def round_begins(self) -> None:
        self._begun.release()


@pytest.mark.parametrize("combiners", [0, 1])
def test_random_kills_change_nothing(ray_session: Session, tmp_path: Path, combiners: int) -> None:
    data = load_data(RECIPE.data, RECIPE.seed, None)
    population, spec = make_population(RECIPE, data), RECIPE.model.spec(data)
    uri = str(tmp_path / "run")
    RunDirectory.create(uri, job="federate", config={}, seeds=[6], now="2026-01-01T00:00:00+00:00")
    run = FederatedRun(
        RECIPE, data, population, spec, workers=2, worker_cpus=0, run_uri=uri,
        checkpoint_every=1, slice_s=0.0, combiners=combiners,
    )  # fmt: skip
    first = next(iter(run.rounds(1)))  # the workers have started
    start = time.monotonic()
    seen = [first.round_id, *(summary.round_id for summary in run.rounds(2, have=1))]
    roles = ("worker", "worker") if combiners else ("worker", "coordinator")
    killer = Killer(run, combiners, roles, time.monotonic() - start)
    killer.start()
    for have in range(2, ROUNDS):
        killer.round_begins()
        seen += [summary.round_id for summary in run.rounds(have + 1, have=have)]
    killer.join(timeout=60)  # a kill after the last round must not matter either
    assert seen == list(range(ROUNDS))
    assert "worker" in killer.killed
    undisturbed = make_job(RECIPE, spec, population)
    run_rounds(undisturbed, data.samples(), ROUNDS)
    found = run.weights()
    if combiners:  # another tree of sums: equal up to rounding, whatever dies
        assert np.abs(found - undisturbed.strategy.weights(0)).max() < 1e-6
    else:
        assert np.array_equal(found, undisturbed.strategy.weights(0))
    run.close()
