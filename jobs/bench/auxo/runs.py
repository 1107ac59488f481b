"""One run of one method on one planted population, scored as it trains; shared by the claims."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from jobs.bench.pieces import Piece, measure_pieces
from raysys import machine
from raysys.bench import Profile
from raysys.federated.auxo.auxo import STRIDE, Auxo
from raysys.federated.auxo.baselines import Cfl, FlexCfl, Ifca, OnePass
from raysys.federated.auxo.config import AuxoConfig, published, repaired
from raysys.federated.auxo.grouped import GroupedLines, random_groups
from raysys.federated.auxo.planted import (
    CohortScore,
    Planted,
    PlantedConfig,
    plant,
    score_clients,
)
from raysys.federated.core.batching import all_samples
from raysys.federated.core.datasets import FederatedData, load_digits_data, load_mnist_data
from raysys.federated.core.engine import FederatedJob
from raysys.federated.core.evaluation import outputs
from raysys.federated.core.fedavg import FedAvg, QFedAvg
from raysys.federated.core.ladder import sample_losses
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.messages import ScreenConfig
from raysys.federated.core.model import Mlp, ModelSpec
from raysys.federated.core.runner import run_round
from raysys.federated.core.server import Yogi

LOCAL = LocalConfig(epochs=1, batch_size=10, lr=0.1)
PER_ROUND, EVERY = 100, 10
TARGETS = (0.6, 0.7, 0.8, 0.85)
INNER = ("fedavg", "fedyogi", "fedprox", "qfedavg")
RIVALS = ("fedavg", "ifca", "cfl", "fl+hc", "flexcfl", "random", "oracle")
METHODS = ("auxo", "published", "repaired", *RIVALS)
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run: a method on a planted population, ``rounds * 100`` device-rounds long."""

    method: str
    case: PlantedConfig
    seed: int
    rounds: int = 200
    inner: str = "fedavg"
    config: AuxoConfig | None = None

    @property
    def name(self) -> str:
        """Readable and short."""
        case = self.case
        return f"{self.method}-{case.kind}-{case.groups}-{case.alpha:g}-{self.seed}".replace(
            "+", ""
        )


_KEPT: dict[Run, Row] = {}


def measured(profile: Profile, runs: Sequence[Run]) -> list[Row]:
    """Rows of runs, each measured once in a process, or kept in the profile's folder."""
    fresh = [run for run in dict.fromkeys(runs) if run not in _KEPT]
    pieces = [
        Piece(run.name, dataclasses.asdict(run), functools.partial(_row_of, run)) for run in fresh
    ]
    _KEPT.update(zip(fresh, measure_pieces(profile.partial, pieces)))
    return [_KEPT[run] for run in runs]


def _row_of(run: Run) -> Row:
    return run_method(run).row()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a run came to.

    Args:
        score: over all clients that the method has seen. curve: (device-rounds, mean accuracy).
        downloads: models sent, per participation. evaluations: extra model evaluations that a
            participant did. macs, bytes_down: of all devices, as the engine counts them.
        seconds: CPU.
    """

    method: str
    score: CohortScore
    curve: list[tuple[int, float]]
    device_rounds: int
    downloads: float
    evaluations: float
    leaves: int
    wasted: int
    explored: int
    events: list[dict[str, Any]]
    macs: float
    bytes_down: float
    seconds: float

    def reaches(self, target: float) -> int | None:
        """Device-rounds until the mean accuracy first reached ``target``."""
        return next((rounds for rounds, accuracy in self.curve if accuracy >= target), None)

    def row(self) -> dict[str, Any]:
        """JSON-ready figures."""
        figures = {name: round(value, 4) for name, value in dataclasses.asdict(self.score).items()}
        return {
            **figures,
            "device_rounds": self.device_rounds,
            "downloads_per_participation": round(self.downloads, 3),
            "extra_evaluations": round(self.evaluations, 3),
            "cohorts": self.leaves,
            "wasted": self.wasted,
            "explored": self.explored,
            "cpu_s": round(self.seconds, 1),
            "splits": [e["round"] for e in self.events if e["event"] == "split"],
            "to_target": {f"{target:g}": self.reaches(target) for target in TARGETS},
        }


@functools.lru_cache(maxsize=8)
def base_data(seed: int) -> FederatedData:
    """MNIST at 14x14 where it is on this machine, else the packaged digits."""
    folder = machine.data_dir()
    if folder is not None and (folder / "mnist-t10k").is_dir():
        return load_mnist_data(folder / "mnist-t10k", seed, side=14)
    return load_digits_data(seed, image=True)


@functools.lru_cache(maxsize=4)
def planted(config: PlantedConfig, seed: int) -> Planted:
    """A planted population; kept, since every method runs on the same one."""
    return plant(base_data(seed), config, seed)


def spec_of(data: FederatedData) -> ModelSpec:
    """The pilot's MLP: one hidden layer of 64."""
    return ModelSpec(architecture=Mlp(sizes=(int(np.prod(data.inputs.shape[1:])), 64, 10)))


def make_line(spec: ModelSpec, inner: str, per_round: int = PER_ROUND) -> Callable[[], FedAvg]:
    """Builder of the model line that a method puts into every cohort."""
    if inner == "fedyogi":
        return lambda: FedAvg(spec, LOCAL, per_round, Yogi(eta=0.03))
    if inner == "fedprox":
        return lambda: FedAvg(spec, dataclasses.replace(LOCAL, prox_mu=0.01), per_round)
    if inner == "qfedavg":
        return lambda: QFedAvg(spec, LOCAL, per_round, q=1.0)
    return lambda: FedAvg(spec, LOCAL, per_round)


def probe_of(spec: ModelSpec, data: Planted) -> Callable[..., npt.NDArray[np.float64]]:
    """IFCA's evaluations: loss of every model on all own samples of each participant."""
    inputs = torch.from_numpy(data.data.inputs)
    targets = torch.from_numpy(data.data.targets)

    def probe(
        weights: npt.NDArray[np.float32], clients: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64]:
        index, scale = all_samples(data.population, clients)
        found = []
        for row in weights:
            out = outputs(spec, row, inputs[index.flatten()])
            losses = sample_losses(out, targets[index.flatten()], "classification")
            found.append((losses.view(index.shape) * scale).sum(dim=1).numpy())
        return np.stack(found, axis=1).astype(np.float64)

    return probe


def make_strategy(run: Run, spec: ModelSpec, data: Planted) -> Any:
    """A run's strategy."""
    groups, n = len(data.test_targets), data.population.n_clients
    line = make_line(spec, run.inner)
    some = random_groups(n, groups, run.seed)
    rivals: dict[str, Callable[[], Any]] = {
        "auxo": lambda: Auxo(run.config or AuxoConfig(), PER_ROUND, line),
        "published": lambda: Auxo(published(), PER_ROUND, line),
        "repaired": lambda: Auxo(repaired(), PER_ROUND, line),
        "fedavg": lambda: GroupedLines(1, PER_ROUND, line),
        "oracle": lambda: GroupedLines(groups, PER_ROUND, line, data.group_of),
        "random": lambda: GroupedLines(groups, PER_ROUND, line, some),
        "ifca": lambda: Ifca(groups, PER_ROUND, line, probe_of(spec, data)),
        "cfl": lambda: Cfl(n, make_line(spec, run.inner, n)),
        "fl+hc": lambda: OnePass(groups, PER_ROUND, line),
        "flexcfl": lambda: FlexCfl(groups, PER_ROUND, line),
    }
    return rivals[run.method]()


def run_method(run: Run) -> Outcome:
    """Run one method; scored every 10 rounds, at equal device-rounds for every method."""
    torch.set_num_threads(1)
    data = planted(run.case, run.seed)
    spec = spec_of(data.data)
    strategy = make_strategy(run, spec, data)
    job = FederatedJob(strategy, data.population, run.seed, screen=ScreenConfig(min_fraction=0.5))
    samples = data.data.samples()
    budget, spent, due = run.rounds * PER_ROUND, 0, EVERY * PER_ROUND
    macs, down = 0.0, 0.0
    seen = np.zeros(data.population.n_clients, dtype=bool)
    curve: list[tuple[int, float]] = []
    begin = time.process_time()
    while spent < budget:
        report = run_round(job, samples)
        seen[report.table.clients] = True
        spent += len(report.table.clients)
        macs, down = macs + report.macs, down + report.bytes_down
        if spent >= due:
            due += EVERY * PER_ROUND
            curve.append((spent, score(strategy, data, spec, np.flatnonzero(seen)).mean))
    seconds = time.process_time() - begin
    found = score(strategy, data, spec, np.flatnonzero(seen))
    return _outcome(run.method, strategy, found, curve, spent, macs, down, seconds)


def score(
    strategy: Any,
    data: Planted,
    spec: ModelSpec,
    clients: npt.NDArray[np.int64],
    group_of: npt.NDArray[np.int64] | None = None,
) -> CohortScore:
    """Score a strategy's assignment of clients to models."""
    if isinstance(strategy, Auxo):
        leaves = np.array(strategy.tree.leaves)
        models = np.stack([strategy.weights(int(leaf) * STRIDE) for leaf in leaves])
        row = np.searchsorted(leaves, strategy.best_leaves(clients))
    else:
        models, row = strategy.stacked(), strategy.groups(clients)
    return score_clients(data, spec, models, row, clients, group_of)


def _outcome(
    method: str,
    strategy: Any,
    found: CohortScore,
    curve: list[tuple[int, float]],
    spent: int,
    macs: float,
    bytes_down: float,
    seconds: float,
) -> Outcome:
    is_auxo = isinstance(strategy, Auxo)
    groups = len(strategy.tree.leaves) if is_auxo else len(strategy.lines)
    extra = 0.0 if is_auxo else strategy.extra_downloads / max(spent, 1)
    return Outcome(
        method=method,
        score=found,
        curve=curve,
        device_rounds=spent,
        downloads=1.0 + extra,
        evaluations=extra + 1 if extra else 0.0,
        leaves=groups,
        wasted=strategy.wasted if is_auxo else 0,
        explored=strategy.explored if is_auxo else 0,
        events=[e for e in strategy.events if e["event"] != "blocked"] if is_auxo else [],
        macs=macs,
        bytes_down=bytes_down,
        seconds=seconds,
    )
