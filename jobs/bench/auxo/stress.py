"""Auxo when the world changes or lies: drift, late groups, unseen clients, forgers, noise."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from jobs.bench.auxo.contest import main_cases, sizes
from jobs.bench.auxo.runs import PER_ROUND, Row, make_line, planted, probe_of, score, spec_of
from jobs.bench.pieces import Piece, measure_pieces
from raysys.bench import Baseline, Claim, Profile
from raysys.federated.auxo.affinity import AffinityEntry, AffinityRecord
from raysys.federated.auxo.auxo import STRIDE, Auxo
from raysys.federated.auxo.clustering import adjusted_rand
from raysys.federated.auxo.config import AuxoConfig
from raysys.federated.auxo.grouped import GroupedLines
from raysys.federated.auxo.planted import Planted, PlantedConfig, drift
from raysys.federated.core.engine import FederatedJob
from raysys.federated.core.messages import FeedbackSpec, IntArray, ScreenConfig, TrainTask
from raysys.federated.core.model import Mlp, ModelSpec
from raysys.federated.core.population import Population
from raysys.federated.core.randomness import Purpose, hashed
from raysys.federated.core.runner import run_round
from raysys.federated.core.strategy import Assignment
from raysys.federated.core.training import train_task

NOISE = {"2": 1.0, "4": 0.77, "8": 0.6}
# Bounded at about the usual length of an update (0.33). The sketch is as long as the update: the
# noise has the same power in any sketch, and fewer numbers put more of it where groups differ.
CLIP = 0.3
UNDER_NOISE = AuxoConfig(
    sketch_dim=2048, subspace_decay=0.97, window=10, stab_min=0.65, agree_min=0.7
)
LOST, FORGED, FLIPPED = 0.2, 0.05, 0.1


class _Recovery:
    """Counts how many participations each watched client needs until its cohort is right."""

    def __init__(self, clients: IntArray, group_of: IntArray) -> None:
        self._clients = clients
        self._group_of = group_of
        self._count = np.zeros(len(group_of), dtype=np.int64)
        self.needed: dict[int, int] = {}

    def note(self, strategy: Auxo, taken: IntArray) -> None:
        """Take the participants of a round that has closed."""
        self._count[taken] += 1
        everybody = np.arange(len(self._group_of))
        leaves = strategy.best_leaves(everybody)
        settled = strategy.table.rewards(everybody)[:, strategy.tree.leaves].max(axis=1) > 0
        for leaf in strategy.tree.leaves:
            members = self._group_of[settled & (leaves == leaf)]
            if not len(members):
                continue
            own = int(np.bincount(members).argmax())
            if (members == own).mean() < 0.6:  # nobody's cohort
                continue
            for client in self._clients[leaves[self._clients] == leaf].tolist():
                right = settled[client] and self._group_of[client] == own
                if right and client not in self.needed and self._count[client]:
                    self.needed[client] = int(self._count[client])

    def row(self) -> Row:
        """Shares and percentiles."""
        met = self._clients[self._count[self._clients] > 0]
        found = [self.needed[c] for c in met.tolist() if c in self.needed]
        enough = self._clients[self._count[self._clients] >= 3]
        return {
            "watched_that_took_part": len(met),
            "recovered": round(len(found) / max(len(met), 1), 4),
            "recovered_of_those_with_3": round(
                sum(c in self.needed for c in enough.tolist()) / max(len(enough), 1), 4
            ),
            "median_participations": float(np.median(found)) if found else None,
            "p90_participations": float(np.percentile(found, 90)) if found else None,
        }


def drifting(profile: Profile) -> Claim:
    """Participations until a client that changed its group is in its new cohort (a tenth does)."""
    return _change_claim("drift", profile, _drift_run)


def late_group(profile: Profile) -> Claim:
    """Participations until clients of a group that comes at half time have their own cohort."""
    return _change_claim("late_group", profile, _late_run)


def _change_claim(name: str, profile: Profile, run: Callable[..., Row]) -> Claim:
    clients, rounds, seeds = sizes(profile)
    case = main_cases(clients)[1]
    pieces = [
        Piece(
            f"{name}-{seed}",
            {"claim": name, "seed": seed, "case": dataclasses.asdict(case), "rounds": rounds},
            functools.partial(run, case, seed, rounds),
        )
        for seed in seeds
    ]
    rows = measure_pieces(profile.partial, pieces)
    medians = [row["median_participations"] for row in rows]
    worst = [1e3 if value is None else value for value in medians]
    return Claim(
        name=name,
        value=statistics.mean(worst),
        unit="participations, median over clients",
        better="lower",
        samples=rows,
        seeds=list(seeds),
    )


def _drift_run(case: PlantedConfig, seed: int, rounds: int) -> Row:
    data = planted(case, seed)
    strategy, job = _auxo_job(data, seed)
    samples = data.data.samples()
    while job.round_id < rounds // 2 + rounds // 10:
        run_round(job, samples)
    job.population, group_of, moved = drift(data, 0.1, seed)
    recovery = _Recovery(moved, group_of)
    while job.round_id < 2 * rounds:
        taken = run_round(job, samples).table.clients
        recovery.note(strategy, taken)
    return _changed_row(recovery, strategy, data, group_of, moved)


def _late_run(case: PlantedConfig, seed: int, rounds: int) -> Row:
    data = planted(case, seed)
    # Number the clients so that the last group comes last; it is not there in the first half.
    order = np.argsort(data.group_of == case.groups - 1, kind="stable")
    ids = data.population.sample_ids.reshape(case.clients, -1)[order]
    offsets = data.population.offsets
    data = dataclasses.replace(
        data,
        group_of=data.group_of[order],
        mix=data.mix[order],
        population=Population(offsets=offsets, sample_ids=ids.reshape(-1)),
    )
    early = int((data.group_of < case.groups - 1).sum())
    strategy, job = _auxo_job(data, seed)
    everybody = job.population
    job.population = Population(offsets=offsets[: early + 1], sample_ids=ids[:early].reshape(-1))
    samples = data.data.samples()
    while job.round_id < rounds // 2 + rounds // 10:
        run_round(job, samples)
    job.population = everybody
    late = np.arange(early, case.clients)
    recovery = _Recovery(late, data.group_of)
    while job.round_id < 2 * rounds:
        recovery.note(strategy, run_round(job, samples).table.clients)
    return _changed_row(recovery, strategy, data, data.group_of, late)


def _changed_row(
    recovery: _Recovery, strategy: Auxo, data: Planted, group_of: IntArray, watched: IntArray
) -> Row:
    spec = spec_of(data.data)
    everybody = np.arange(len(group_of))
    watched_score = score(strategy, data, spec, watched, group_of)
    return {
        **recovery.row(),
        "ari": round(score(strategy, data, spec, everybody, group_of).ari, 4),
        "accuracy": round(score(strategy, data, spec, everybody, group_of).mean, 4),
        "accuracy_of_watched": round(watched_score.mean, 4),
        "cohorts": len(strategy.tree.leaves),
        "splits": [e["round"] for e in strategy.events if e["event"] == "split"],
    }


def unseen(profile: Profile) -> Claim:
    """Never-seen clients placed by one local training of the anchor, against one forward pass."""
    clients, rounds, seeds = sizes(profile)
    case = main_cases(clients)[1]
    rows: list[Row] = []
    for seed in seeds:
        data = planted(case, seed)
        strategy, job = _auxo_job(data, seed)
        seen = np.zeros(clients, dtype=bool)
        while job.round_id < rounds * 2 // 5:
            seen[run_round(job, data.data.samples()).table.clients] = True
        others = np.flatnonzero(~seen)
        group_of = data.group_of[others]
        found = _by_anchor(strategy, data, others, seed), _by_loss(strategy, data, others)
        anchor, forward = (round(adjusted_rand(part, group_of), 4) for part in found)
        splits = [e["round"] for e in strategy.events if e["event"] == "split"]
        rows.append(
            {"clients": len(others), "anchor": anchor, "forward_pass": forward, "splits": splits}
        )
    return Claim(
        name="unseen",
        value=statistics.mean(row["anchor"] for row in rows),
        unit="adjusted Rand index of clients that never took part",
        better="higher",
        baseline=Baseline(
            name="all cohorts evaluated on the device",
            value=statistics.mean(row["forward_pass"] for row in rows),
        ),
        samples=rows,
        seeds=list(seeds),
    )


def _by_anchor(strategy: Auxo, data: Planted, clients: IntArray, seed: int) -> IntArray:
    """Part that one local training of the last split's weights points to."""
    anchor = strategy.forest.anchors.get(0)
    if anchor is None:
        return np.zeros(len(clients), dtype=np.int64)
    spec = spec_of(data.data)
    feedback = FeedbackSpec(sketch_dim=strategy.config.sketch_dim)
    task = TrainTask(
        round_id=10_000, attempt=0, task_id=0, spec=spec, clients=clients,
        rows=np.zeros(len(clients), dtype=np.int64), models=1, local=anchor.line.local,
        feedback=feedback, seed=seed, rung="batched", chunk_size=50,
    )  # fmt: skip
    weights = anchor.line.weights(0)[None]
    partial = train_task(task, weights, data.data.samples(), data.population)
    assert partial.sketch is not None
    return anchor.views[0].place(partial.sketch.astype(np.float64))[0]


def _by_loss(strategy: Auxo, data: Planted, clients: IntArray) -> IntArray:
    models = np.stack([strategy.weights(leaf * STRIDE) for leaf in strategy.tree.leaves])
    found: IntArray = probe_of(spec_of(data.data), data)(models, clients).argmin(axis=1)
    return found


def robustness(profile: Profile) -> Claim:
    """Accuracy of honest clients under each disturbance, beside FedAvg and true groups."""
    clients, rounds, seeds = sizes(profile)
    case = main_cases(clients)[1]
    trials: dict[str, dict[str, float]] = {
        "undisturbed": {}, "20 % of records lost": {"lost": LOST},
        "5 % forge their record": {"forged": FORGED}, "10 % flip labels": {"flipped": FLIPPED},
        **{f"noise for epsilon {eps}": {"noise": z} for eps, z in NOISE.items()},
    }  # fmt: skip
    if not profile.full:
        trials = {n: t for n, t in trials.items() if "noise" not in n or "8" in n}
    methods = ("auxo", "fedavg", "oracle")
    pieces = [
        Piece(
            f"robust-{seed}-{method}-{number}",
            {
                "trial": name,
                "seed": seed,
                "method": method,
                "rounds": rounds,
                "clients": clients,
                **trial,
            },
            functools.partial(_disturbed, case, seed, rounds, method, **trial),
        )
        for number, (name, trial) in enumerate(trials.items())
        for method in methods
        for seed in seeds
    ]
    rows = iter(measure_pieces(profile.partial, pieces))
    table: dict[str, Any] = {}
    for name in trials:
        table[name] = {m: [next(rows) for _ in seeds] for m in methods}
    gaps = {
        name: statistics.mean(r["accuracy"] for r in row["auxo"])
        - statistics.mean(r["accuracy"] for r in row["fedavg"])
        for name, row in table.items()
    }
    return Claim(
        name="robustness",
        value=100 * min(gaps.values()),
        unit="points of accuracy over FedAvg, smallest over the disturbances",
        better="higher",
        baseline=Baseline(name="FedAvg under the same", value=0.0),
        samples={"gain_by_disturbance": gaps, "runs": table},
        seeds=list(seeds),
    )


class _Disturbed(Auxo):
    """Auxo whose devices lose or forge their records before they check in."""

    lost = 0.0
    forgers: frozenset[int] = frozenset()

    def assign(self, round_id: int, clients: IntArray) -> list[Assignment]:
        """Spoil the records of this round's devices, then place them."""
        draw = hashed(77, Purpose.FAULTS, round_id, clients) % np.uint64(1000)
        self.table.forget(clients[draw < np.uint64(1000 * self.lost)])
        for client in clients.tolist():
            if client in self.forgers:
                leaves = self.tree.leaves
                wish = leaves[int(hashed(78, Purpose.FAULTS, round_id, client)) % len(leaves)]
                entry = AffinityEntry(cohort=wish, reward=1.0, label=0, tried=True)
                self.check_in(client, AffinityRecord(entries=(entry,)), round_id)
        return super().assign(round_id, clients)


def _disturbed(
    case: PlantedConfig,
    seed: int,
    rounds: int,
    method: str,
    lost: float = 0.0,
    forged: float = 0.0,
    flipped: float = 0.0,
    noise: float = 0.0,
) -> Row:
    """One run; noise is each participant's share of the noise of the sum, on a linear model."""
    torch.set_num_threads(1)
    data = planted(case, seed)
    rng = np.random.default_rng([seed, 5])
    bad = rng.choice(case.clients, round((forged + flipped) * case.clients), replace=False)
    if flipped:
        data = _with_flippers(data, bad)
    spec = spec_of(data.data)
    screen = ScreenConfig(min_fraction=0.5)
    if noise:
        spec = ModelSpec(architecture=Mlp(sizes=(spec.architecture.sizes[0], 10)))
        share = noise * CLIP / PER_ROUND**0.5
        screen = ScreenConfig(min_fraction=0.5, clip_norm=CLIP, local_noise=share)
    line = make_line(spec, "fedavg")
    strategy: Any = GroupedLines(1, PER_ROUND, line)
    if method == "oracle":
        strategy = GroupedLines(case.groups, PER_ROUND, line, data.group_of)
    if method == "auxo":
        strategy = _Disturbed(UNDER_NOISE if noise else AuxoConfig(), PER_ROUND, line)
        strategy.lost = lost
        strategy.forgers = frozenset(bad.tolist()) if forged else frozenset()
    job = FederatedJob(strategy, data.population, seed, screen=screen)
    samples = data.data.samples()
    while job.round_id < (rounds // 2 if noise else rounds):  # long sketches take their time
        run_round(job, samples)
    honest = np.setdiff1d(np.arange(case.clients), bad)
    found = score(strategy, data, spec, honest)
    blocked = set()
    if method == "auxo":
        blocked = {e["client"] for e in strategy.events if e["event"] == "blocked"}
    return {
        "accuracy": round(found.mean, 4),
        "worst": round(found.worst, 4),
        "ari": round(found.ari, 4),
        "cohorts": len(strategy.tree.leaves) if method == "auxo" else len(strategy.lines),
        "bad_blocked": len(blocked & set(bad.tolist())),
        "honest_blocked": len(blocked - set(bad.tolist())),
        "bad": len(bad),
    }


def _with_flippers(data: Planted, bad: npt.NDArray[np.int64]) -> Planted:
    """Clients whose labels are all turned round: y becomes 9 - y."""
    pool = len(data.data.targets)
    flipped = dataclasses.replace(
        data.data,
        inputs=np.concatenate([data.data.inputs, data.data.inputs]),
        targets=np.concatenate([data.data.targets, data.data.classes - 1 - data.data.targets]),
    )
    ids = data.population.sample_ids.reshape(data.population.n_clients, -1).copy()
    ids[bad] += pool
    population = Population(offsets=data.population.offsets, sample_ids=ids.reshape(-1))
    return dataclasses.replace(data, data=flipped, population=population)


def _auxo_job(data: Planted, seed: int) -> tuple[Auxo, FederatedJob]:
    torch.set_num_threads(1)
    spec = spec_of(data.data)
    strategy = Auxo(AuxoConfig(), PER_ROUND, make_line(spec, "fedavg"))
    screen = ScreenConfig(min_fraction=0.5)
    return strategy, FederatedJob(strategy, data.population, seed, screen=screen)
