"""The Fed-ensemble strategy: K inner lines, each client trains one of them a round.

Section 2 of the paper. A client downloads, trains and uploads one model, so a round costs what a
FedAvg round costs; the engine trains clients of different models in one tensor program. We differ
in the schedule's late binding (see :mod:`schedule`) and in the plain mean as aggregation, to which
the released code's soft responsibilities saturate.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from raysys.config import check, check_choice, check_range
from raysys.errors import ConfigError
from raysys.federated.core.aggregation import ModelSum
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.messages import FeedbackSpec, IntArray
from raysys.federated.core.model import FlatWeights, ModelSpec, layout_of
from raysys.federated.core.privacy import Guarantee, PrivateAvg
from raysys.federated.core.randomness import Purpose, generator
from raysys.federated.core.strategy import Assignment, Demand, JobFacts, RoundReport, StateArrays
from raysys.federated.fed_ensemble.schedule import PermutationSchedule

WELL_FED = 4  # participants that a model needs a round to do well
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EnsembleConfig:
    """An ensemble.

    Args:
        k: number of models; 3 to 5 with at least four participants each is a good range.
        strata: "client", "random", or a number of groups.
        members: seeds of the members' starts, all different; None numbers them 0..K-1.
        warm_rounds: rounds in which only one model trains before all K start from it, each with
            its own perturbation; 0 starts all independently.
        perturbation: standard deviation of that perturbation, relative to the model's own.
        share: "none", or "trunk": all tensors but the last two are one trunk that every client
            trains, under K heads. Cheaper to store, and its uncertainty is weaker.
    """

    k: int = 3
    strata: str | int = "client"
    members: tuple[int, ...] | None = None
    warm_rounds: int = 0
    perturbation: float = 0.1
    share: str = "none"

    def __post_init__(self) -> None:
        check_range(self, "k", 1)
        check_range(self, "warm_rounds", 0)
        check_range(self, "perturbation", 0, 10)
        check_choice(self, "share", ("none", "trunk"))
        if self.members is not None:
            check(self, "members", len(self.members) == self.k, f"{self.k} seeds")
            different = len(set(self.members)) == len(self.members)
            check(self, "members", different, "all different", "Equal starts give equal members")


class FedEnsemble:
    """K models trained at the cost of one.

    Args:
        config: the ensemble. clients_per_round: answers wanted in a round, over all models.
        make_inner: builds one model line; called K times, so that moments are per model.
    """

    def __init__(
        self, config: EnsembleConfig, clients_per_round: int, make_inner: Callable[[], FedAvg]
    ) -> None:
        self.config = config
        self.clients_per_round = clients_per_round
        self.lines = [make_inner() for _ in range(config.k)]
        self._private = [line for line in self.lines if isinstance(line, PrivateAvg)]
        for line in self._private:
            line.lines = config.k
        self._central = any(line.privacy.mode == "central" for line in self._private)
        self._check_private()
        self.spec: ModelSpec = self.lines[0].spec
        self.replaced: list[tuple[int, int]] = []
        self._schedule: PermutationSchedule | None = None
        self._seed = 0
        self._placed: list[tuple[IntArray, IntArray]] = []
        self._counts = np.zeros(config.k, dtype=np.int64)
        self._coverage = np.zeros((0, 0), dtype=np.int64)
        self._folded: dict[int, ModelSum] = {}
        self._sound: dict[int, FlatWeights] = {}

    @property
    def schedule(self) -> PermutationSchedule:
        """The schedule, once the job has started."""
        if self._schedule is None:
            raise ConfigError("strategy", "not started", "start() before use")
        return self._schedule

    def start(self, facts: JobFacts) -> None:
        """Start every line from its own seed."""
        self._seed = facts.seed
        members = self.config.members or tuple(range(self.config.k))
        for member, line in zip(members, self.lines):
            line.start(dataclasses.replace(facts, member=member))
        if self.config.share == "trunk":
            trunk = self.lines[0].weights(0)[: self._trunk]
            for line in self.lines[1:]:
                line.reset(np.concatenate([trunk, line.weights(0)[self._trunk :]]))
        if self.clients_per_round < WELL_FED * self.config.k:
            _log.warning(
                "%d clients a round for %d models: fewer than %d each starve them",
                self.clients_per_round, self.config.k, WELL_FED,
            )  # fmt: skip
        n = facts.population.n_clients
        self._schedule = PermutationSchedule(
            self.config.k, n, facts.seed, self.config.strata, self._may_balance
        )
        rows = self.config.strata if isinstance(self.config.strata, int) else n
        self._coverage = np.zeros((rows, self.config.k), dtype=np.int64)

    def model_spec(self, model_id: int) -> ModelSpec:
        """All members have one architecture."""
        return self.spec

    def demand(self, round_id: int) -> list[Demand]:
        """One stream; any device is fine. Opens the round: an aborted attempt leaves nothing."""
        self._placed.clear()
        self._counts = np.zeros(self.config.k, dtype=np.int64)
        self._mend(round_id)
        if self._private:
            return self.lines[0].demand(round_id)
        return [Demand(clients=self.clients_per_round)]

    def next_model(self, client: int, round_id: int = 0) -> int:
        """Model that a client would train next."""
        return self.schedule.next_model(client, round_id)

    def assign(self, round_id: int, clients: IntArray) -> list[Assignment]:
        """Place clients by the schedule, one assignment per model that got any."""
        if round_id < self.config.warm_rounds:
            models = np.zeros(len(clients), dtype=np.int64)
        else:
            models = self.schedule.place(clients, round_id, self._counts)
        self._placed.append((clients, models))
        arranged = clients[np.argsort(models, kind="stable")]
        assignments = []
        begin = 0
        for model, count in enumerate(np.bincount(models, minlength=self.config.k).tolist()):
            own, begin = arranged[begin : begin + count], begin + count
            parts = self.lines[model].assign(round_id, own) if count else []
            assignments += [
                Assignment(clients=p.clients, model_id=model, version=p.version, local=p.local)
                for p in parts
            ]
        return assignments

    def local_config(self, round_id: int) -> LocalConfig:
        """That of the inner lines."""
        return self.lines[0].local_config(round_id)

    def accept(self, client: int, model: int) -> None:
        """Count an accepted update of ``model`` by ``client``."""
        self.accept_many(np.array([client]), np.array([model]))

    def accept_many(self, clients: IntArray, models: IntArray) -> None:
        """Count the accepted updates of a round; clients are all different."""
        self.schedule.accept(clients)
        if isinstance(self.config.strata, int):
            np.add.at(self._coverage, (self.schedule.strata_of(clients), models), 1)
        else:  # strata are clients, all different
            self._coverage[clients, models] += 1

    def coverage(self) -> npt.NDArray[np.int64]:
        """Accepted updates by stratum and model, int64 [strata, K]."""
        return self._coverage.copy()

    def weights(self, model_id: int) -> FlatWeights:
        """Current weights of a member."""
        return self.lines[model_id].weights(0)

    def stacked(self) -> npt.NDArray[np.float32]:
        """Weights of all members, float32 [K, P]."""
        return np.stack([line.weights(0) for line in self.lines])

    def feedback_spec(self) -> FeedbackSpec:
        """What the inner lines ask for."""
        return self.lines[0].feedback_spec()

    def controls(self, clients: IntArray) -> npt.NDArray[np.float32] | None:
        """No corrections."""
        return None

    def fold(self, round_id: int, model_id: int, total: ModelSum) -> None:
        """Keep the sums of a model until the round closes."""
        self._folded[model_id] = total

    def close(self, round_id: int, report: RoundReport) -> None:
        """Server step of every line; a model that got nothing stays as it is."""
        table = report.table
        warm = round_id < self.config.warm_rounds
        if not warm:
            clients = table.clients[table.ok]
            self.accept_many(clients, self._placed_models(clients))
        folded, self._folded = self._folded, {}
        if self.config.share == "trunk" and folded:
            folded = _share_trunk(folded, self._trunk, self.config.k)
        for member, line in enumerate(self.lines):
            if member in folded:
                line.fold(round_id, 0, folded[member])
            line.close(round_id, report.of_model(member))
        if not warm:
            starved = self.schedule.close_round(self._counts)
            if starved:
                _log.warning("models %s have trained nobody for rounds; now %d", starved, round_id)
        self._mend(round_id)
        if round_id + 1 == self.config.warm_rounds:
            self._branch(round_id)

    def predict_plan(self, client: int) -> list[tuple[int, float]]:
        """All members with equal weights; see :mod:`prediction` for personal ones."""
        return [(member, 1.0 / self.config.k) for member in range(self.config.k)]

    def guarantee(self) -> Guarantee | None:
        """What all models together have spent of their clients' privacy; None without any."""
        return self._private[0].guarantee() if self._private else None

    def diversity(self) -> float:
        """Mean distance between members' weights over their mean norm."""
        stacked = self.stacked().astype(np.float64)
        k = len(stacked)
        if k == 1:
            return 0.0
        gaps = [np.linalg.norm(stacked[i] - stacked[j]) for i in range(k) for j in range(i)]
        return float(np.mean(gaps) / np.linalg.norm(stacked, axis=1).mean())

    def replace(self, member: int, round_id: int = 0) -> None:
        """Start a member anew from another finite one plus noise.

        Raises:
            ConfigError: no other member is finite.
        """
        healthy = [
            k for k in range(self.config.k) if k != member and np.isfinite(self.weights(k)).all()
        ]
        if not healthy:
            raise ConfigError("member", member, "another member with finite weights", "Lower lr")
        source = self.weights(healthy[member % len(healthy)])
        self.lines[member].reset(self._perturbed(source, round_id, member))
        self.replaced.append((round_id, member))

    def state(self) -> StateArrays:
        """All lines, the schedule and the coverage."""
        lines = {
            f"line{k}.{name}": value
            for k, line in enumerate(self.lines)
            for name, value in line.state().items()
        }
        schedule = {f"schedule.{name}": value for name, value in self.schedule.state().items()}
        return {
            "k": np.array([self.config.k]),
            "coverage": self._coverage,
            **lines,
            **schedule,
        }

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore :meth:`state`.

        Raises:
            ConfigError: the checkpoint holds another number of models.
        """
        found = int(state["k"][0]) if "k" in state else 0
        if found != self.config.k:
            raise ConfigError("k", self.config.k, f"the checkpoint's K {found}")
        for k, line in enumerate(self.lines):
            line.load(_strip(state, f"line{k}."))
        self.schedule.load(_strip(state, "schedule."))
        self._coverage = np.array(state["coverage"], dtype=np.int64)

    @property
    def _may_balance(self) -> bool:
        """Whether a client's model may depend on who else takes part."""
        return not self._central

    def _check_private(self) -> None:
        """Refuse what would tell more than the noisy sums do."""
        for name, value, allowed in (
            ("warm_rounds", self.config.warm_rounds, 0),
            ("share", self.config.share, "none"),
        ):
            if self._central and value != allowed:
                raise ConfigError(
                    f"ensemble.{name}", value, f"{allowed!r} with central privacy",
                    "A model's step would depend on how many clients trained another",
                )  # fmt: skip

    @property
    def _trunk(self) -> int:
        """Number of leading parameters that a shared trunk holds."""
        return sum(layout_of(self.spec).sizes[:-2])

    def _placed_models(self, clients: IntArray) -> IntArray:
        """Models that these clients were given in this round."""
        if not len(clients):
            return np.empty(0, dtype=np.int64)
        known, models = (np.concatenate(part) for part in zip(*self._placed))
        order = np.argsort(known)
        found: IntArray = models[order[np.searchsorted(known, clients, sorter=order)]]
        return found

    def _mend(self, round_id: int) -> None:
        for member in range(self.config.k):
            values = self.weights(member)
            if values is self._sound.get(member):
                continue  # weights are replaced, never changed: looked at before
            # The square of the norm is finite for all but broken (or astronomically long) weights.
            if not math.isfinite(values @ values) and not np.isfinite(values).all():
                self.replace(member, round_id)
            self._sound[member] = self.weights(member)

    def _branch(self, round_id: int) -> None:
        """End the warm start: every other member becomes a perturbed copy of the first."""
        for member in range(1, self.config.k):
            self.lines[member].reset(self._perturbed(self.weights(0), round_id, member))

    def _perturbed(self, values: FlatWeights, round_id: int, member: int) -> FlatWeights:
        rng = generator(self._seed, Purpose.INITIALISATION, round_id + 1, member)
        scale = self.config.perturbation * float(values.std())
        return values + rng.standard_normal(len(values), dtype=np.float32) * np.float32(scale)


def _share_trunk(folded: Mapping[int, ModelSum], trunk: int, k: int) -> dict[int, ModelSum]:
    """Give every model the trunk's mean over all clients; its head stays its own clients'."""
    weight = sum(total.weight for total in folded.values())
    if weight <= 0:
        return dict(folded)
    width = len(next(iter(folded.values())).delta)
    mean = sum(total.delta[:trunk] for total in folded.values()) / weight
    shared = {}
    for member in range(k):
        own = folded.get(member)
        if own is None or own.weight <= 0:  # its head stays where it is
            own = ModelSum(np.zeros(width), 1.0)
        delta = np.concatenate([mean * own.weight, own.delta[trunk:]])
        shared[member] = dataclasses.replace(own, delta=delta)
    return shared


def _strip(state: Mapping[str, npt.NDArray[Any]], prefix: str) -> dict[str, npt.NDArray[Any]]:
    return {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
