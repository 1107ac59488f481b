"""The Auxo strategy: one model line per cohort, and cohorts that split while they train.

"Auxo: Efficient Federated Learning via Scalable Client Clustering" (Liu et al., SoCC 2023). Clients
do no extra work: the server reads sketches of the updates that it gets anyway and the losses. Where
we differ is a switch in :class:`~raysys.federated.auxo.config.RuleConfig`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from raysys.errors import ConfigError
from raysys.federated.auxo.affinity import AffinityRecord, AffinityTable
from raysys.federated.auxo.cohort import SplitReport
from raysys.federated.auxo.config import AuxoConfig
from raysys.federated.auxo.forest import Forest
from raysys.federated.auxo.observer import Observer
from raysys.federated.auxo.parts import subset
from raysys.federated.auxo.placement import DECLINED, Quotas, make_quotas, rank_leaves
from raysys.federated.auxo.tree import ROOT, CohortTree
from raysys.federated.core.aggregation import ModelSum
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.messages import FeedbackSpec, IntArray
from raysys.federated.core.model import FlatWeights, ModelSpec
from raysys.federated.core.randomness import Purpose, hashed
from raysys.federated.core.strategy import (
    Assignment,
    Demand,
    JobFacts,
    RoundReport,
    StateArrays,
    Strategy,
)

STRIDE = 1 << 12
TRIAL = STRIDE >> 1
MOST_PLACEMENTS = 2


class Auxo:
    """Cohorts over any strategy.

    Args:
        config: thresholds and rules. clients_per_round: answers wanted, over all cohorts.
        make_inner: builds one model line (FedAvg with any server, an ensemble, a family); called
            once per cohort. It must not use control variates.
    """

    def __init__(
        self, config: AuxoConfig, clients_per_round: int, make_inner: Callable[[], Strategy]
    ) -> None:
        config.check_budget(clients_per_round)
        self.config = config
        self.clients_per_round = clients_per_round
        self.forest = Forest(config, make_inner)
        self.wasted = 0
        self.explored = 0
        self.frozen = False
        self._quotas = Quotas({}, 0, 0)
        self._placed: dict[int, tuple[int, int, bool]] = {}
        self._sums: dict[int, ModelSum] = {}

    @property
    def tree(self) -> CohortTree:
        """The tree of cohorts."""
        return self.forest.tree

    @property
    def events(self) -> list[dict[str, Any]]:
        """Splits, merges, re-opened cohorts and blocked clients, with the evidence."""
        return self.forest.events

    @property
    def table(self) -> AffinityTable:
        """The affinity records, once the job has started."""
        return self.forest.table

    def start(self, facts: JobFacts) -> None:
        """Start the root cohort."""
        self.forest.start(facts)

    def demand(self, round_id: int) -> list[Demand]:
        """One stream for all cohorts, and spare offers where small cohorts need them."""
        self._placed.clear()
        self._sums.clear()
        needs = [d for leaf in self.tree.leaves for d in self.forest.line(leaf).demand(round_id)]
        n = self.forest.facts.population.n_clients
        budget, p_min = self.config.budget, self.config.p_min
        expected = self.forest.expected()
        self._quotas = make_quotas(expected, self.clients_per_round, p_min, budget, n)
        weakest = min(needs, key=lambda d: d.min_mac_s)
        return [
            Demand(
                clients=self.clients_per_round,
                min_mac_s=weakest.min_mac_s,
                min_memory_bytes=weakest.min_memory_bytes,
                spare=self._quotas.offers - self.clients_per_round,
            )
        ]

    def assign(self, round_id: int, clients: IntArray) -> list[Assignment]:
        """Place devices by affinity; one that no leaf has room for is declined."""
        clients = self._shuffled(round_id, clients)
        leaves = np.array(self.tree.leaves, dtype=np.int64)
        first, second, gap, member = self._preferences(round_id, clients, leaves)
        unplaced = self.forest.unplaced(clients, member)
        parts: dict[tuple[int, bool], list[int]] = {}
        for place, client in enumerate(clients.tolist()):
            if unplaced[place] >= 0:
                cohort = self._quotas.take_any(int(unplaced[place]))
                if cohort != DECLINED:
                    parts.setdefault((cohort, True), []).append(client)
                continue
            options = int(leaves[first[place]]), int(leaves[second[place]])
            leaf = self._quotas.take(*options, float(gap[place]))
            if leaf == DECLINED:
                continue
            trial = not member[place, int(np.searchsorted(leaves, leaf))]
            trial = trial and self.config.rules.probation
            parts.setdefault((leaf, trial), []).append(client)
        return [a for key in sorted(parts) for a in self._to_line(round_id, *key, parts[key])]

    def place(self, record: AffinityRecord, client: int = 0, round_id: int = 0) -> int:
        """Leaf that a device with this record belongs to; a newcomer's is drawn at random."""
        leaves = self.tree.leaves
        rewards = {e.cohort: e.reward for e in record.entries if np.isfinite(e.reward)}
        labels = np.full(len(self.tree.nodes), -1, dtype=np.int64)
        for entry in record.entries:
            if 0 <= entry.cohort < len(labels):
                labels[entry.cohort] = entry.label
        draw = int(
            hashed(self.forest.facts.seed, Purpose.SCHEDULE, round_id, client) >> np.uint64(1)
        )
        known = [leaf for leaf in leaves if leaf in rewards]
        if known:
            return max(known, key=lambda leaf: rewards[leaf])
        wanted = max(rewards, key=lambda c: rewards[c]) if rewards else ROOT
        return self.tree.resolve(wanted, labels, draw)

    def check_in(self, client: int, record: AffinityRecord, round_id: int) -> bool:
        """Use the record that a device brings instead of the table's; False if partly refused."""
        return self.table.accept(client, record, round_id)

    def fold(self, round_id: int, model_id: int, total: ModelSum) -> None:
        """Keep the sums until the round closes: who is accepted shows only then."""
        self._sums[model_id] = total

    def close(self, round_id: int, report: RoundReport) -> None:
        """Feedback, server steps, splits and merges."""
        rows = np.flatnonzero(report.table.ok)
        leaves = np.array([self._placed[int(c)][0] for c in report.table.clients], dtype=np.int64)
        anchored = 0
        for number in list(self.forest.anchors):
            newcomers = rows[leaves[rows] == number]
            anchored += len(newcomers)
            clients = report.table.clients[newcomers].tolist()
            models = np.array([self._placed[client][1] for client in clients], dtype=np.int64)
            self.forest.place_newcomers(round_id, report.table, number, newcomers, models)
        self.wasted += anchored
        for leaf in list(self.tree.leaves):
            self._close_leaf(round_id, report, leaf, rows[leaves[rows] == leaf])
        if not self.frozen:
            self.forest.maybe_merge(round_id, anchored / self.clients_per_round)

    def members(self) -> dict[int, float]:
        """Clients whose best leaf accepts them, by leaf; before the first split, all seen."""
        return self.forest.members()

    def membership(self, client: int) -> dict[int, float]:
        """Probability of each leaf, softmax of rewards over 0.1; uniform for an unknown client."""
        leaves = self.tree.leaves
        rewards = self.table.rewards(np.array([client]))[0, leaves]
        weight = np.exp((rewards - rewards.max()) / 0.1)
        return dict(zip(leaves, (weight / weight.sum()).tolist()))

    def best_leaves(self, clients: IntArray) -> IntArray:
        """Leaf of highest reward of each client; ties and newcomers by hash."""
        leaves = np.array(self.tree.leaves, dtype=np.int64)
        rewards, none = self.table.rewards(clients)[:, leaves], np.zeros(len(clients))
        seed = self.forest.facts.seed
        nowhere = np.zeros(len(clients), dtype=np.int64)
        first, _, _ = rank_leaves(rewards, none, nowhere, none > 0, clients, seed, 0)
        return leaves[first]

    def explain_split(self, leaf: int) -> SplitReport | None:
        """Evidence of the latest decision about a cohort; None before there was one."""
        return self.forest.reports.get(leaf)

    def freeze(self) -> None:
        """Stop clustering; cohorts go on training."""
        self.frozen = True

    def model_spec(self, model_id: int) -> ModelSpec:
        """Spec of a cohort's model."""
        spec: ModelSpec = self.forest.line(model_id // STRIDE).model_spec(model_id % TRIAL)
        return spec

    def local_config(self, round_id: int) -> LocalConfig:
        """That of the root's line."""
        local: LocalConfig = self.forest.line(ROOT).local_config(round_id)
        return local

    def weights(self, model_id: int) -> FlatWeights:
        """Current weights of a cohort's model."""
        values: FlatWeights = self.forest.line(model_id // STRIDE).weights(model_id % TRIAL)
        return values

    def feedback_spec(self) -> FeedbackSpec:
        """What the inner line asks for, and sketches of whole and half updates."""
        inner: FeedbackSpec = self.forest.line(ROOT).feedback_spec()
        halves = self.config.rules.features == "signal" or self.config.rules.gate == "corrected"
        return dataclasses.replace(inner, sketch_dim=self.config.sketch_dim, halves=halves)

    def controls(self, clients: IntArray) -> npt.NDArray[np.float32] | None:
        """No corrections."""
        return None

    def predict_plan(self, client: int) -> list[tuple[int, float]]:
        """The models of the client's best leaf."""
        leaf = int(self.best_leaves(np.array([client], dtype=np.int64))[0])
        return [
            (leaf * STRIDE + m, share) for m, share in self.forest.line(leaf).predict_plan(client)
        ]

    def export_cohorts(self) -> StateArrays:
        """Tree and records, for another job over the same clients."""
        return self.forest.export()

    def import_cohorts(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Start from known cohorts: every leaf begins with this job's own initial model."""
        self.forest.adopt(state)

    def state(self) -> StateArrays:
        """The forest, and what was counted."""
        numbers = [self.wasted, self.explored, int(self.frozen)]
        log = json.dumps({"events": self.events}).encode()
        return {
            **self.forest.state(),
            "numbers": np.array(numbers, dtype=np.int64),
            "events": np.frombuffer(log, dtype=np.uint8).copy(),
        }

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore :meth:`state`.

        Raises:
            ConfigError: the state is not one of Auxo, or of another inner line.
        """
        if "cohorts" not in state or "tree" not in state:
            raise ConfigError("state", sorted(state)[:4], "a state of Auxo")
        self.forest.load(state)
        self.wasted, self.explored, frozen = (int(n) for n in state["numbers"])
        self.frozen = bool(frozen)
        self.forest.events[:] = json.loads(np.asarray(state["events"]).tobytes())["events"]

    def _preferences(
        self, round_id: int, clients: IntArray, leaves: IntArray
    ) -> tuple[IntArray, IntArray, npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        """First and second leaf of each client, their gap, and whose member it is [k, leaves]."""
        rewards = self.table.rewards(clients)[:, leaves]
        alone = len(leaves) == 1
        blocked = self.table.blocked(clients)
        member = (rewards > 0) & ~blocked[:, None] if not alone else ~blocked[:, None]
        homeless = self.forest.homeless(clients, leaves) & self.forest.gathers
        eps = [self._exploration(round_id, int(leaf)) for leaf in leaves]
        explore = np.array(eps)[rewards.argmax(axis=1)] if not alone else np.zeros(len(clients))
        nursery = np.searchsorted(leaves, self.forest.nursery(clients))
        seed = self.forest.facts.seed
        ranked = rank_leaves(rewards, explore, nursery, homeless, clients, seed, round_id)
        self.explored += int((ranked[0] != rewards.argmax(axis=1)).sum()) if not alone else 0
        first, second, gap = ranked
        rows = np.arange(len(clients))
        # Whom its cohort has accepted does not go to one that has not, however near the rewards.
        stays = (rewards[rows, first] > 0) & (rewards[rows, second] <= 0)
        return first, second, np.where(stays, np.inf, gap), member

    def _exploration(self, round_id: int, leaf: int) -> float:
        age = max(0, round_id - self.forest.cohorts[leaf].opened)
        return self.config.eps_0 * self.config.eps_decay**age

    def _to_line(
        self, round_id: int, leaf: int, trial: bool, clients: list[int]
    ) -> list[Assignment]:
        ids = np.sort(np.array(clients, dtype=np.int64))
        base = leaf * STRIDE + (TRIAL if trial else 0)
        parts = self.forest.line(leaf).assign(round_id, ids)
        for part in parts:
            for client in part.clients.tolist():
                self._placed[client] = (leaf, part.model_id, trial)
        return [dataclasses.replace(part, model_id=base + part.model_id) for part in parts]

    def _close_leaf(self, round_id: int, report: RoundReport, leaf: int, rows: IntArray) -> None:
        """Feedback to the participants of a leaf, then its server step."""
        cohort = self.forest.cohorts[leaf]
        table = report.table
        placed = [self._placed[int(c)] for c in table.clients[rows]]
        models = np.array([model for _, model, _ in placed], dtype=np.int64)
        trial = np.array([t for _, _, t in placed], dtype=bool)
        if len(rows) and not self.frozen:
            observer = Observer(self.config, self.tree, self.table, self.forest.log)
            observer.observe(round_id, cohort, table, rows, models, trial)
        split = None if self.frozen else self.forest.consider_split(round_id, cohort)
        # Where no member took part, the newcomers are the cohort.
        newcomers_only = bool(trial.all())
        kept = rows if newcomers_only else rows[~trial]
        self.wasted += len(rows) - len(kept)
        offset = TRIAL if newcomers_only else 0
        for model in np.unique(models[trial == newcomers_only]).tolist():
            total = self._sums.get(leaf * STRIDE + offset + model)
            if total is not None:
                cohort.line.fold(round_id, model, total)
        cohort.line.close(round_id, dataclasses.replace(report, table=subset(table, kept)))
        if split is not None:
            self.forest.split(round_id, cohort, split)

    def _shuffled(self, round_id: int, clients: IntArray) -> IntArray:
        """An order that no client owes to its number: the last ones may be declined."""
        keys = hashed(self.forest.facts.seed, Purpose.SELECTION, round_id, clients)
        return clients[np.argsort(keys, kind="stable")]
