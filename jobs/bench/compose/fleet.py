"""Swan phones granted by Venn to an Auxo, a FedTrans and a Fed-ensemble job on one population.

Two choices are crossed: who grants (Venn's planner, or one random order of the open requests), and
which cores a phone trains on (Swan's, or greedily all fast ones). Learning is real in every arm.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from typing import Any

import numpy as np
import torch

from jobs.bench.auxo import runs as auxo_runs
from jobs.bench.fedtrans import arena as fedtrans_arena
from jobs.bench.pieces import Piece, measure_pieces
from raysys.bench import Baseline, Claim, Profile
from raysys.compose.granted import GrantedJob
from raysys.compose.phones import Phones
from raysys.compose.shared_fleet import (
    FleetJob,
    IntArray,
    JobOutcome,
    Learn,
    SharedFleetConfig,
    masks_of,
    run_shared,
)
from raysys.federated.auxo.auxo import Auxo
from raysys.federated.auxo.config import AuxoConfig
from raysys.federated.auxo.planted import PlantedConfig
from raysys.federated.core.evaluation import outputs
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.model import Mlp, ModelSpec
from raysys.federated.core.partition import PartitionConfig, partition
from raysys.federated.fed_ensemble.ensemble import EnsembleConfig, FedEnsemble
from raysys.federated.fedtrans.cells import Dense
from raysys.federated.fedtrans.config import FedTransConfig
from raysys.federated.fedtrans.network import CellNet
from raysys.federated.fedtrans.strategy import FedTrans
from raysys.federated.swan.fleet import FleetDevice, draw_fleet
from raysys.federated.swan.soc import MOBILENETV2
from raysys.federated.venn.baselines import random_per_request
from raysys.federated.venn.irs import IRS, IRSConfig
from raysys.federated.venn.requests import Policy

PHONES_QUICK, PHONES_FULL = 400, 1000
ONLINE, UNIT_S, BETA, LINK_S = 0.3, 2.0, 1.0, 20.0
POLICIES = ("venn", "random")
USES = ("swan", "greedy")
LOCAL = LocalConfig(steps=20, batch_size=10, lr=0.05)
NAMES = ("auxo", "fedtrans", "fed_ensemble")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One run: who grants, on which cores phones train, and how large it is."""

    policy: str
    use: str
    seed: int
    phones: int
    rounds: int
    participants: int

    def piece(self) -> Piece:
        """The run, by itself."""
        name = f"{self.policy}-{self.use}-{self.seed}"
        return Piece(name, dataclasses.asdict(self), functools.partial(run_arm, self))


def shared_fleet(profile: Profile) -> Claim:
    """Mean completion time of three jobs: random granting of greedy phones over Venn with Swan."""
    size = profile.pick((PHONES_QUICK, 10, 20), (PHONES_FULL, 80, 40))
    seeds = tuple(range(profile.pick(1, 3)))
    arms = [
        Arm(policy=policy, use=use, seed=seed, phones=size[0], rounds=size[1], participants=size[2])
        for seed in seeds
        for policy in POLICIES
        for use in USES
    ]
    rows = measure_pieces(profile.partial, [arm.piece() for arm in arms])
    table = {
        f"{policy}+{use}": _mean([r for r in rows if (r["policy"], r["use"]) == (policy, use)])
        for policy in POLICIES
        for use in USES
    }
    ratios = [
        _row(rows, "random", "greedy", seed)["mean_completion_h"]
        / _row(rows, "venn", "swan", seed)["mean_completion_h"]
        for seed in seeds
    ]
    return Claim(
        name="shared_fleet",
        value=statistics.median(ratios),
        unit="times less mean completion time (simulated clock, SoC model)",
        better="higher",
        baseline=Baseline(name="random granting, greedy phones", value=1.0),
        ratio=statistics.median(ratios),
        samples={"table": table, "rows": rows, "ratios": ratios},
        seeds=list(seeds),
    )


def run_arm(arm: Arm) -> dict[str, Any]:
    """One arm: times, energy and accuracy of each job."""
    torch.set_num_threads(1)
    devices = draw_fleet(arm.phones, MOBILENETV2, BETA, arm.use, UNIT_S, arm.seed)
    phones = Phones(devices, ONLINE, LINK_S, arm.seed)
    scores = np.array([device.cpu_score for device in devices])
    strong, stronger = np.quantile(np.unique(scores), (0.35, 0.65))
    masks = masks_of(scores, (0.0, float(strong), float(stronger)))
    learners = {
        "auxo": _auxo(arm),
        "fedtrans": _fedtrans(arm, devices),
        "fed_ensemble": _ensemble(arm),
    }
    groups = {"fedtrans": 0, "auxo": 1, "fed_ensemble": 2}
    jobs = [
        FleetJob(name=name, group=groups[name], participants=arm.participants, rounds=arm.rounds)
        for name in NAMES
    ]
    policy: Policy = random_per_request()
    if arm.policy == "venn":
        policy = IRS(IRSConfig(demand_scope="total", yield_factor=2.0))
    learn: list[Learn] = [functools.partial(_learn, learners[name]) for name in NAMES]
    config = SharedFleetConfig(seed=arm.seed)
    found = run_shared(phones, masks, jobs, policy, learn, config)
    return {
        "policy": arm.policy,
        "use": arm.use,
        "seed": arm.seed,
        "data": ", ".join(fedtrans_arena.data_sets()),
        "mean_completion_h": statistics.mean(one.completion_s for one in found) / 3600.0,
        "kilojoules": sum(one.joules for one in found) / 1000.0,
        "excluded": len(phones.excluded),
        "jobs": {
            name: _job_row(one, learners[name].accuracy())
            for name, one in zip(NAMES, found, strict=True)
        },
    }


@dataclasses.dataclass(slots=True)
class Learner:
    """A job's learning, and how well its clients are served."""

    job: GrantedJob
    accuracy: Any


def _learn(learner: Learner, round_id: int, devices: IntArray) -> None:
    learner.job.round(devices)


def _auxo(arm: Arm) -> Learner:
    """Two planted groups of clients whose labels disagree."""
    case = PlantedConfig(groups=2, clients=arm.phones, samples=40)
    data = auxo_runs.planted(case, arm.seed)
    spec = auxo_runs.spec_of(data.data)
    line = auxo_runs.make_line(spec, "fedavg", arm.participants)
    strategy = Auxo(AuxoConfig(), arm.participants, line)
    job = GrantedJob(strategy, data.population, data.data.samples(), arm.seed)
    everyone = np.arange(arm.phones)
    return Learner(job, lambda: auxo_runs.score(strategy, data, spec, everyone).mean)


def _fedtrans(arm: Arm, devices: list[FleetDevice]) -> Learner:
    """A family whose hardware tiers are the speeds that the phones' profiles show."""
    data = fedtrans_arena.load(fedtrans_arena.data_sets()[-1], arm.seed)
    scheme = PartitionConfig(scheme="dirichlet", clients=arm.phones, alpha=0.5)
    net = CellNet(shape=tuple(data.inputs.shape[1:]), cells=(Dense(width=8),),
                  classes=data.classes or 0)  # fmt: skip
    step_s = np.array([device.step_s for device in devices])
    config = FedTransConfig(growth=fedtrans_arena.growing(arm.rounds))
    slowest = net.macs() / config.assignment.sample_s
    population = dataclasses.replace(
        partition(data.targets, scheme, arm.seed), rate_mac_s=slowest * step_s.max() / step_s
    )

    def line(spec: ModelSpec, start: Any) -> FedAvg:
        return FedAvg(spec, LOCAL, arm.participants, start_weights=start)

    strategy = FedTrans(net, arm.participants, line, config)
    job = GrantedJob(strategy, population, data.samples(), arm.seed)

    def accuracy() -> float:
        plans = [tuple(strategy.predict_plan(client)) for client in range(arm.phones)]
        scores = {plan: _accuracy(strategy, plan, data) for plan in set(plans)}
        return float(np.mean([scores[plan] for plan in plans]))

    return Learner(job, accuracy)


def _ensemble(arm: Arm) -> Learner:
    """Three members on clients with few classes each."""
    data = fedtrans_arena.load(fedtrans_arena.data_sets()[0], arm.seed)
    scheme = PartitionConfig(scheme="dirichlet", clients=arm.phones, alpha=0.5)
    population = partition(data.targets, scheme, arm.seed)
    sizes = (int(np.prod(data.inputs.shape[1:])), 64, data.classes or 0)
    spec = ModelSpec(architecture=Mlp(sizes=sizes))
    strategy = FedEnsemble(
        EnsembleConfig(k=3), arm.participants, lambda: FedAvg(spec, LOCAL, arm.participants)
    )
    job = GrantedJob(strategy, population, data.samples(), arm.seed)
    plan = tuple((model, 1 / 3) for model in range(3))
    return Learner(job, lambda: _accuracy(strategy, plan, data))


def _accuracy(strategy: Any, plan: tuple[tuple[int, float], ...], data: Any) -> float:
    inputs = torch.from_numpy(data.test_inputs)
    mean = sum(
        share * outputs(strategy.model_spec(m), strategy.weights(m), inputs).softmax(dim=1)
        for m, share in plan
    )
    hits = mean.argmax(dim=1).numpy() == data.test_targets  # type: ignore[union-attr]
    return float(np.mean(hits))


def _job_row(outcome: JobOutcome, accuracy: float) -> dict[str, Any]:
    return {
        "completion_h": outcome.completion_s / 3600.0,
        "accuracy": accuracy,
        "kilojoules": outcome.joules / 1000.0,
        "assigned": outcome.assigned,
        "answered": outcome.answered,
        "aborted": outcome.aborted,
    }


def _row(rows: list[dict[str, Any]], policy: str, use: str, seed: int) -> dict[str, Any]:
    return next(
        row for row in rows if (row["policy"], row["use"], row["seed"]) == (policy, use, seed)
    )


def _mean(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds."""
    return {
        "mean_completion_h": statistics.mean(row["mean_completion_h"] for row in rows),
        "kilojoules": statistics.mean(row["kilojoules"] for row in rows),
        "excluded": statistics.mean(row["excluded"] for row in rows),
        **{
            f"{name}_{field}": statistics.mean(row["jobs"][name][field] for row in rows)
            for name in NAMES
            for field in ("completion_h", "accuracy")
        },
    }
