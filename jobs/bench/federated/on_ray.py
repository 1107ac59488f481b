"""Those claims of the federated core that go through Ray: speed, determinism, flat memory."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.federated.driver import FederatedRun
from actors.session import Session, SessionConfig
from raysys.bench import Claim, Profile
from raysys.federated.core.datasets import FederatedData, load_digits_data
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.model import Mlp, ModelSpec
from raysys.federated.core.population import Population
from raysys.federated.core.recipe import FederatedConfig

SAMPLES = 50
SPEC = ModelSpec(architecture=Mlp(sizes=(64, 64, 10)))
LOCAL = LocalConfig(epochs=1, batch_size=10, lr=0.1)


def digits_population(n_clients: int, n_samples: int, seed: int = 0) -> Population:
    """Clients of 50 samples each, drawn with repetition from the training set."""
    rng = np.random.default_rng(seed)
    return Population(
        offsets=np.arange(n_clients + 1, dtype=np.int64) * SAMPLES,
        sample_ids=rng.integers(0, n_samples, n_clients * SAMPLES, dtype=np.int32),
    )


@contextlib.contextmanager
def federated_run(
    clients_per_round: int,
    workers: int,
    population: int = 1000,
    slice_s: float = 1.0,
    spec: ModelSpec = SPEC,
    image: bool = False,
) -> Iterator[FederatedRun]:
    """The digits job on a Ray cluster: the one that runs, or a private one for this claim."""
    session = None if ray.is_initialized() else Session.start(SessionConfig(address="local"))
    data: FederatedData = load_digits_data(0, image)
    recipe = FederatedConfig(seed=0, clients_per_round=clients_per_round, local=LOCAL)
    clients = digits_population(population, len(data.targets))
    run = FederatedRun(recipe, data, clients, spec, workers=workers, worker_cpus=0, slice_s=slice_s)
    try:
        yield run
    finally:
        run.close()
        if session is not None:
            session.close()


def clients_per_second(profile: Profile) -> Claim:
    """Digits MLP through Ray, two workers, 100 of 1,000 clients a round: clients per wall second.

    The first rounds, in which the workers start, are left out. ``per_cpu_second`` counts the
    workers' own processor time, which other load on the machine hardly changes.
    """
    slices, rounds = profile.pick(5, 9), 40
    rates: list[float] = []
    cpu_rates: list[float] = []
    with federated_run(100, workers=2, slice_s=60.0) as run:
        list(run.rounds(5))
        for number in range(slices):
            begin = time.perf_counter()
            found = list(run.rounds(5 + (number + 1) * rounds, have=5 + number * rounds))
            elapsed = time.perf_counter() - begin
            updates = sum(summary.counts["ok"] for summary in found)
            rates.append(updates / elapsed)
            cpu_rates.append(updates / sum(summary.busy_s for summary in found))
    return Claim(
        name="clients_per_second",
        value=statistics.median(rates),
        unit="clients per second of wall time",
        better="higher",
        samples={"wall": rates, "best_wall": max(rates), "per_worker_cpu_second": cpu_rates},
        seeds=[0],
    )


def workers_equal(profile: Profile) -> Claim:
    """Largest difference of the final weights between 1, 2 and 3 workers; 0 is equal to the bit."""
    rounds = profile.pick(20, 100)
    found: dict[int, Any] = {}
    for workers in (1, 2, 3):
        with federated_run(120, workers) as run:
            list(run.rounds(rounds))
            found[workers] = run.weights()
    gaps = {n: float(np.abs(found[n] - found[1]).max()) for n in (2, 3)}
    same = all(found[n].tobytes() == found[1].tobytes() for n in (2, 3))
    return Claim(
        name="workers_equal",
        value=max(gaps.values()),
        unit="largest difference of a weight",
        better="lower",
        samples={"gaps": gaps, "bitwise_equal": same, "rounds": rounds},
        seeds=[0],
    )


def memory_flat(profile: Profile) -> Claim:
    """Growth of object store and resident memory per 1,000 rounds, after a warm-up of 200."""
    rounds = profile.pick(1000, 3000)
    with federated_run(20, workers=2, slice_s=60.0) as run:
        list(run.rounds(200))
        before = _memory(run)
        list(run.rounds(200 + rounds, have=200))
        after = _memory(run)
    growth = {name: (after[name] - before[name]) * 1000 / rounds for name in before}
    return Claim(
        name="memory_flat",
        value=sum(growth.values()) / 2**20,
        unit="MiB per 1,000 rounds, object store and three processes",
        better="lower",
        samples={"before": before, "after": after, "growth_per_1000_rounds": growth},
        seeds=[0],
    )


def _memory(run: FederatedRun) -> dict[str, float]:
    """Bytes of the object store, and resident bytes of coordinator and workers."""
    facts = run.health()
    pids = {"coordinator": facts["pid"]}
    pids.update({f"worker_{n}": w["pid"] for n, w in enumerate(facts["workers"])})
    return {"object_store": _store_bytes(), **{n: _resident(pid) for n, pid in pids.items()}}


def _resident(pid: int) -> float:
    """Resident bytes without shared pages: mapped objects belong to the store."""
    fields = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()
    return (float(fields[1]) - float(fields[2])) * 4096


def _store_bytes() -> float:
    """Bytes in use in the local object store, as the raylet counts them."""
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return float(get_memory_info_reply(state).store_stats.object_store_bytes_used)
