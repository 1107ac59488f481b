"""What Auxo costs at scale: a million clients, and what a sketch loses against whole updates."""

from __future__ import annotations

import resource
import statistics
import time

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment

from jobs.bench.auxo.contest import main_cases, more_cases
from jobs.bench.auxo.runs import LOCAL, base_data, planted, spec_of
from raysys.bench import Baseline, Claim, Profile
from raysys.federated.auxo.auxo import Auxo
from raysys.federated.auxo.clustering import kmeans, unit_rows
from raysys.federated.auxo.config import AuxoConfig
from raysys.federated.auxo.evidence import SignalSpace
from raysys.federated.auxo.planted import Planted
from raysys.federated.core.batching import cut_chunks, draw_batches
from raysys.federated.core.engine import FederatedJob
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.ladder import train_chunk
from raysys.federated.core.population import Population
from raysys.federated.core.randomness import KeyedStreams, Purpose
from raysys.federated.core.runner import run_rounds
from raysys.federated.core.sketch import sketch_rows
from raysys.federated.core.strategy import RoundReport

FloatArray = npt.NDArray[np.float64]
GROUPS = 4


class _Timed(Auxo):
    """Auxo that times its own part of each round."""

    seconds: list[float]

    def close(self, round_id: int, report: RoundReport) -> None:
        """Feedback, clustering, server steps."""
        begin = time.process_time()
        super().close(round_id, report)
        self.seconds.append(time.process_time() - begin)


def million_clients(profile: Profile) -> Claim:
    """Mean CPU time of feedback per round with records of a million clients and four cohorts.

    Stability is measured every other round, so that a median would hide its cost.

    The process's resident memory grows by the records, the population and the job.
    """
    torch.set_num_threads(1)
    n, per_round = 1_000_000, 1000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = base_data(0)
    spec = spec_of(data)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, len(data.targets), n * 10, dtype=np.int32)
    population = Population(offsets=np.arange(n + 1) * 10, sample_ids=ids)
    strategy = _Timed(AuxoConfig(), per_round, lambda: FedAvg(spec, LOCAL, per_round))
    strategy.seconds = []
    job = FederatedJob(strategy, population, 0)
    everybody = np.arange(n)
    table, tree = strategy.table, strategy.tree
    children = tree.split(0, GROUPS, 1)
    table.add_cohorts(GROUPS)
    rewards = np.zeros((n, 1 + GROUPS))
    rewards[everybody, 1 + everybody % GROUPS] = 0.2
    table.set_rewards(everybody, rewards, 0)
    for child in children:
        line = strategy.forest.copy_of(strategy.forest.line(0))
        strategy.forest.add_cohort(child, line, 1)
    rounds = profile.pick(12, 40)
    begin = time.process_time()
    run_rounds(job, data.samples(), rounds)
    whole = time.process_time() - begin
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    records = sum(array.nbytes for array in table.state().values())
    return Claim(
        name="million_clients",
        value=1000 * statistics.fmean(strategy.seconds[5:]),
        unit="ms of CPU for feedback per round of 1,000 participants",
        better="lower",
        baseline=Baseline(name="the whole round", value=1000 * whole / rounds),
        samples={
            "feedback_ms": [round(1000 * value, 1) for value in strategy.seconds],
            "records_mib": round(records / 2**20, 1),
            "resident_growth_mib": round(grown / 1024, 1),
        },
        seeds=[0],
    )


def sketch_agreement(profile: Profile) -> Claim:
    """Share of clients with the same label from 128 numbers as from the whole update."""
    torch.set_num_threads(1)
    cases = [main_cases(1000)[1], more_cases(1000)[0]]
    found = {
        f"{case.kind} {seed}": _agreement(planted(case, seed), seed)
        for case in cases
        for seed in range(profile.pick(1, 3))
    }
    return Claim(
        name="sketch_agreement",
        value=statistics.mean(row["agreement"] for row in found.values()),
        unit="share of participants with equal labels",
        better="higher",
        samples=found,
        seeds=list(range(profile.pick(1, 3))),
    )


def _agreement(data: Planted, seed: int, memory: int = 6, warm: int = 15) -> dict[str, float]:
    """Cluster the last of some rounds by sketches and by whole updates; same directions learned."""
    spec = spec_of(data.data)
    job = FederatedJob(FedAvg(spec, LOCAL, 100), data.population, seed)
    samples = data.data.samples()
    run_rounds(job, samples, warm)
    halves, wholes, groups = [], [], []
    for round_id in range(warm, warm + memory):
        clients = np.random.default_rng([seed, round_id]).choice(1000, 100, replace=False)
        start = torch.from_numpy(job.strategy.weights(0)[None].copy())
        streams = KeyedStreams(seed, Purpose.BATCHES, round_id)
        counts = data.population.counts(clients)
        order = np.concatenate(cut_chunks(counts, LOCAL, 100))
        batches = draw_batches(data.population, clients[order], LOCAL, streams)
        rows = torch.zeros(100, dtype=torch.int64)
        trained = train_chunk(
            "batched", spec, start, rows, samples.inputs, samples.targets, batches, LOCAL,
            halves=True,
        )  # fmt: skip
        assert trained.half is not None
        halves.append(trained.half.numpy())
        wholes.append(trained.delta.numpy())
        groups.append(data.group_of[clients[order]])
        run_rounds(job, samples, round_id + 1)
    flat = np.concatenate([*halves, *wholes]).astype(np.float64)
    # An isometry to the span of these rounds: the same distances in 1,200 numbers.
    values, vectors = np.linalg.eigh(flat @ flat.T)
    exact = vectors * np.sqrt(np.maximum(values, 0))
    sketched = sketch_rows(flat.astype(np.float32), 128, 3, seed).astype(np.float64)
    labels = [_labels(points, memory, seed) for points in (exact, sketched)]
    return {
        "agreement": _matched(labels[0], labels[1]),
        "whole_against_truth": _matched(labels[0], groups[-1]),
        "sketch_against_truth": _matched(labels[1], groups[-1]),
    }


def _labels(points: FloatArray, memory: int, seed: int) -> npt.NDArray[np.int64]:
    """Labels of the last round in the signal space of all rounds."""
    half, whole = np.split(points, 2)
    space = SignalSpace(points.shape[1], 0.9)
    unit = np.zeros((0, 0))
    for first, both in zip(np.split(half, memory), np.split(whole, memory)):
        unit = unit_rows(both)
        space.add(unit, first, both)
    rng = np.random.default_rng(seed)
    return kmeans(space.project(unit, GROUPS), GROUPS, rng, starts=10)[0]


def _matched(first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]) -> float:
    """Share of equal labels under the best matching of names."""
    table = np.zeros((GROUPS, GROUPS))
    np.add.at(table, (first, second), 1)
    return float(table[linear_sum_assignment(-table)].sum() / len(first))
