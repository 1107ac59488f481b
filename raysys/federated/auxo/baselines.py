"""Clustered federated learning before Auxo: IFCA, CFL, FL+HC and a FlexCFL-like method.

They keep what each of them needs in deployment and count it: IFCA sends all K models to every
participant, CFL needs everybody every round, FL+HC needs everybody once, and FlexCFL decides on a
sample of clients and places the rest by their first update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from scipy.cluster.hierarchy import fcluster, linkage

from raysys.federated.auxo.clustering import kmeans
from raysys.federated.auxo.grouped import GroupedLines
from raysys.federated.core.aggregation import ModelSum
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.messages import FeedbackSpec, IntArray
from raysys.federated.core.model import ModelSpec
from raysys.federated.core.randomness import Purpose, generator
from raysys.federated.core.strategy import Assignment, Demand, JobFacts, RoundReport, StateArrays

FloatArray = npt.NDArray[np.float64]
SKETCH = 128


class Probe(Protocol):
    """Mean loss of each model on each client's own samples, float64 [k, models]."""

    def __call__(self, weights_MP: npt.NDArray[np.float32], clients: IntArray) -> FloatArray:
        """Evaluate on the devices."""
        ...


class Ifca(GroupedLines):
    """IFCA (Ghosh et al., NeurIPS 2020): a client trains the model of lowest loss on its data.

    Args:
        probe: the K evaluations that every participant does on its device.
    """

    def __init__(
        self, groups: int, clients_per_round: int, make_inner: Callable[[], FedAvg], probe: Probe
    ) -> None:
        super().__init__(groups, clients_per_round, make_inner, independent=True)
        self._probe = probe

    def assign(self, round_id: int, clients: IntArray) -> list[Assignment]:
        """Let every participant choose; it downloads all models for that."""
        self._group_of[clients] = self._probe(self.stacked(), clients).argmin(axis=1)
        self.extra_downloads += (len(self.lines) - 1) * len(clients)
        return super().assign(round_id, clients)


class Cfl(GroupedLines):
    """CFL (Sattler et al. 2021): everybody trains; a group splits in two by the cosine of updates.

    A group splits when its mean update is short (below 0.4) while some member's is not (above 1.6),
    into the two parts that minimise the largest cosine across. The published bounds are absolute
    and tuned per task; here the mean must be below a share of the longest. Compared by sketches.

    Args:
        share: largest mean over longest update at which a group splits; 1/4 as published.
        warm_rounds: rounds before the first split.
    """

    def __init__(
        self,
        clients: int,
        make_inner: Callable[[], FedAvg],
        max_groups: int = 8,
        share: float = 0.25,
        warm_rounds: int = 2,
    ) -> None:
        super().__init__(1, clients, make_inner)
        self._max = max_groups
        self._share = share
        self._warm = warm_rounds

    def feedback_spec(self) -> FeedbackSpec:
        """Sketches of all updates."""
        return FeedbackSpec(sketch_dim=SKETCH)

    def close(self, round_id: int, report: RoundReport) -> None:
        """Server steps, then splits."""
        super().close(round_id, report)
        table = report.table
        assert table.sketch is not None
        sketch = table.sketch[table.ok].astype(np.float64)
        clients = table.clients[table.ok]
        for group in range(len(self.lines)):
            rows = np.flatnonzero(self._group_of[clients] == group)
            if len(rows) < 4:
                continue
            mean = float(np.linalg.norm(sketch[rows].mean(axis=0)))
            longest = float(np.linalg.norm(sketch[rows], axis=1).max())
            due = round_id + 1 >= self._warm and len(self.lines) < self._max
            if due and mean < self._share * longest:
                self._split(group, clients[rows], sketch[rows])

    def _split(self, group: int, clients: IntArray, sketch: FloatArray) -> None:
        units = sketch / np.maximum(np.linalg.norm(sketch, axis=1, keepdims=True), 1e-12)
        # Cutting the last link of complete linkage on -cosine is the optimal bi-partition of the
        # paper (its algorithm 1 joins the most similar pair until two parts are left).
        part = fcluster(linkage(units, "complete", metric="cosine"), 2, "maxclust")
        if len(np.unique(part)) == 2:
            self._group_of[clients[part == 2]] = self.branch(group)


class OnePass(GroupedLines):
    """FL+HC (Briggs et al. 2020): some rounds of FedAvg, then one round with everybody to cluster.

    Args:
        warm_rounds: rounds before it. groups: number of clusters (told, as a favour).
    """

    def __init__(
        self,
        groups: int,
        clients_per_round: int,
        make_inner: Callable[[], FedAvg],
        warm_rounds: int = 10,
    ) -> None:
        super().__init__(1, clients_per_round, make_inner)
        self._wanted = groups
        self.cluster_round = warm_rounds

    def feedback_spec(self) -> FeedbackSpec:
        """Sketches of all updates."""
        return FeedbackSpec(sketch_dim=SKETCH)

    def demand(self, round_id: int) -> list[Demand]:
        """Everybody in the round that clusters."""
        n = self.facts.population.n_clients
        return [Demand(clients=n if round_id == self.cluster_round else self.clients_per_round)]

    def close(self, round_id: int, report: RoundReport) -> None:
        """Cluster once, by Ward linkage of the sketches (the paper's best), then train apart."""
        super().close(round_id, report)
        if round_id != self.cluster_round:
            return
        table = report.table
        assert table.sketch is not None
        sketch = table.sketch[table.ok].astype(np.float64)
        units = sketch / np.maximum(np.linalg.norm(sketch, axis=1, keepdims=True), 1e-12)
        parts = fcluster(linkage(units, "ward"), self._wanted, "maxclust") - 1
        for _ in range(1, self._wanted):
            self.branch(0)
        self._group_of[table.clients[table.ok]] = parts


class FlexCfl(GroupedLines):
    """FlexCFL-like (Duan et al. 2022): decomposed cosine on pre-trained updates, then fixed groups.

    A sample of clients trains the start model once; the leading singular directions of their
    updates are the features, cosine to them the coordinates, k-means the groups. A later client
    first trains the start model once and joins the group of nearest coordinates.

    Args:
        pretrain: clients in the first round.
    """

    def __init__(
        self,
        groups: int,
        clients_per_round: int,
        make_inner: Callable[[], FedAvg],
        pretrain: int | None = None,
    ) -> None:
        super().__init__(groups, clients_per_round, make_inner)
        self._pretrain = pretrain or 50 * groups
        self._seed = 0
        self._start = np.zeros(0, dtype=np.float32)
        self._centroids = np.zeros((0, 0))
        self._axes = np.zeros((0, 0))
        self._placed = np.zeros(0, dtype=bool)

    def start(self, facts: JobFacts) -> None:
        """Nobody has a group; line 0 of the list is also the start model for newcomers."""
        super().start(facts)
        self._seed = facts.seed
        self._placed = np.zeros(facts.population.n_clients, dtype=bool)
        self._start = self.lines[0].weights(0).copy()

    def weights(self, model_id: int) -> npt.NDArray[np.float32]:
        """A group's weights; the number after the last is the start model."""
        return self._start if model_id == len(self.lines) else super().weights(model_id)

    def model_spec(self, model_id: int) -> ModelSpec:
        """All have one architecture."""
        return self.lines[0].spec

    def feedback_spec(self) -> FeedbackSpec:
        """Sketches of all updates."""
        return FeedbackSpec(sketch_dim=SKETCH)

    def demand(self, round_id: int) -> list[Demand]:
        """A larger first round."""
        n = self.facts.population.n_clients
        wanted = min(self._pretrain, n) if round_id == 0 else self.clients_per_round
        return [Demand(clients=wanted)]

    def assign(self, round_id: int, clients: IntArray) -> list[Assignment]:
        """Newcomers train the start model, the others their group's."""
        fresh = clients[~self._placed[clients]]
        parts = super().assign(round_id, clients[self._placed[clients]])
        if len(fresh):
            parts.append(
                Assignment(
                    clients=fresh, model_id=len(self.lines), version=0, local=self.lines[0].local
                )
            )
        return parts

    def fold(self, round_id: int, model_id: int, total: ModelSum) -> None:
        """Newcomers' updates serve to place them only."""
        if model_id < len(self.lines):
            super().fold(round_id, model_id, total)

    def state(self) -> StateArrays:
        """The lines, the features, and who is placed."""
        return {
            **super().state(),
            "start": self._start,
            "axes": self._axes,
            "centroids": self._centroids,
            "placed": self._placed,
        }

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore :meth:`state`."""
        super().load(state)
        self._start = np.array(state["start"], dtype=np.float32)
        self._axes, self._centroids = np.array(state["axes"]), np.array(state["centroids"])
        self._placed = np.array(state["placed"], dtype=bool)

    def close(self, round_id: int, report: RoundReport) -> None:
        """Place the newcomers of the round."""
        super().close(round_id, report)
        table = report.table
        assert table.sketch is not None
        rows = np.flatnonzero(table.ok & ~self._placed[table.clients])
        if not len(rows):
            return
        sketch = table.sketch[rows].astype(np.float64)
        units = sketch / np.maximum(np.linalg.norm(sketch, axis=1, keepdims=True), 1e-12)
        if not len(self._axes):
            # The directions of the updates as they are (not centred), as in the paper.
            self._axes = np.linalg.svd(units, full_matrices=False)[2][: len(self.lines)]
            rng = generator(self._seed, Purpose.SCHEDULE)
            self._centroids = kmeans(units @ self._axes.T, len(self.lines), rng, starts=10)[1]
        places = units @ self._axes.T
        gap = ((places[:, None] - self._centroids[None]) ** 2).sum(axis=2)
        self._group_of[table.clients[rows]] = gap.argmin(axis=1)
        self._placed[table.clients[rows]] = True
