"""The cohorts of a job and how they come and go: splits, anchors, merges, and their state."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from raysys.errors import ConfigError
from raysys.federated.auxo.affinity import MOST_PLACEMENTS, AffinityTable
from raysys.federated.auxo.anchor import Anchor, views_from
from raysys.federated.auxo.cohort import Cohort, SplitReport
from raysys.federated.auxo.config import AuxoConfig
from raysys.federated.auxo.parts import averaged, direction, plain, strip
from raysys.federated.auxo.tree import ROOT, CohortTree
from raysys.federated.core.aggregation import ClientTable
from raysys.federated.core.messages import IntArray
from raysys.federated.core.strategy import JobFacts, StateArrays, Strategy

MILD = -0.3
FEWEST_LOST = 0.2
FIRST_PART, SECOND_PART = 0.1, 0.05


class Forest:
    """Tree, records, cohorts, anchors and events of one job.

    Args:
        make_inner: builds the model line of a cohort.
    """

    def __init__(self, config: AuxoConfig, make_inner: Callable[[], Strategy]) -> None:
        self.config = config
        self.tree = CohortTree()
        self.cohorts: dict[int, Cohort] = {}
        self.anchors: dict[int, Anchor] = {}
        self.reports: dict[int, SplitReport] = {}
        self.events: list[dict[str, Any]] = []
        self.gathering = -1
        self.foundlings: list[int] = []
        self.gathers = False
        self._make_inner = make_inner
        self._table: AffinityTable | None = None
        self._facts: JobFacts | None = None
        root = make_inner()
        if root.feedback_spec().controls:
            raise ConfigError("inner", "SCAFFOLD", "a line without control variates inside Auxo")
        self.add_cohort(ROOT, root, 0)

    @property
    def table(self) -> AffinityTable:
        """The affinity records, once the job has started."""
        if self._table is None:
            raise ConfigError("strategy", "not started", "start() before use")
        return self._table

    @property
    def facts(self) -> JobFacts:
        """What the job told the strategy, once it has started."""
        if self._facts is None:
            raise ConfigError("strategy", "not started", "start() before use")
        return self._facts

    def start(self, facts: JobFacts) -> None:
        """Start the line of the root cohort."""
        self._facts = facts
        self._table = AffinityTable(facts.population.n_clients, self.config.max_records)
        root = self.cohorts[ROOT].line
        root.start(facts)
        self.add_cohort(ROOT, root, 0)

    def line(self, number: int) -> Any:
        """The strategy that trains a cohort's models, or trained an inner node's."""
        return self.cohorts[number].line

    def homeless(self, clients: IntArray, leaves: IntArray) -> npt.NDArray[np.bool_]:
        """Which clients fit no leaf: none accepts them, and anchors (or all leaves) were tried."""
        rewards = self.table.rewards(clients)[:, leaves]
        unfit = np.asarray((rewards <= 0).all(axis=1))
        if len(leaves) == 1:
            unfit[:] = False
        elif self.anchors and self.config.rules.anchors:
            unfit &= self.table.placements(clients) >= MOST_PLACEMENTS
        else:
            unfit &= self.table.tried(clients)[:, leaves].all(axis=1)
        return unfit

    def nursery(self, clients: IntArray) -> IntArray:
        """Leaf where each client goes if no leaf wants it, so that such clients can become a part.

        A part that was born of such clients, unless it has refused the client clearly; else the
        largest leaf, and the same one until it splits: scattered over the leaves they would split
        off several times.
        """
        if self.gathering not in self.tree.leaves:
            active = self.members()
            self.gathering = max(active, key=lambda leaf: (active[leaf], -leaf))
        found = np.full(len(clients), self.gathering, dtype=np.int64)
        tried, rewards = self.table.tried(clients), self.table.rewards(clients)
        for leaf in self.foundlings:
            if leaf in self.tree.leaves:
                found[~tried[:, leaf] | (rewards[:, leaf] > MILD)] = leaf
        return found

    def expected(self) -> dict[int, float]:
        """Clients that a leaf must have places for: its members, and those who have to try it."""
        found = self.members()
        leaves = np.array(self.tree.leaves, dtype=np.int64)
        if len(leaves) > 1:
            clients = self.table.state()["clients"]
            lost = clients[self.homeless(clients, leaves)]
            # A few odd clients are no group: they go on looking for the least bad cohort.
            self.gathers = len(lost) >= FEWEST_LOST * self.config.min_share * len(clients)
            if not self.gathers:
                return found
            for leaf, count in zip(*np.unique(self.nursery(lost), return_counts=True)):
                found[int(leaf)] += float(count)
        return found

    def members(self) -> dict[int, float]:
        """Clients whose best leaf accepts them, by leaf; before the first split, all seen."""
        leaves = self.tree.leaves
        if len(leaves) == 1:
            return {leaves[0]: float(self.table.used)}
        rewards = self.table.state()["reward"][:, leaves]
        best = rewards.argmax(axis=1)
        counts = np.bincount(best[rewards.max(axis=1) > 0], minlength=len(leaves))
        return {leaf: float(n) for leaf, n in zip(leaves, counts)}

    def unplaced(self, clients: IntArray, member: npt.NDArray[np.bool_]) -> IntArray:
        """Cohort whose anchor each client is to train, -1 for those that go to a leaf.

        An anchor places a client without a leaf, and once more one that its leaf has refused; after
        that the client belongs to no known part.
        """
        found = np.full(len(clients), -1, dtype=np.int64)
        if not self.anchors or not self.config.rules.anchors:
            return found
        wanted = ~member.any(axis=1) & (self.table.placements(clients) < MOST_PLACEMENTS)
        wanted &= ~self.table.blocked(clients)  # member of nothing, but placed
        for place in np.flatnonzero(wanted).tolist():
            at = ROOT
            while at in self.anchors:
                found[place] = at
                label = int(self.table.labels(clients[place : place + 1], at)[0])
                children = self.tree.nodes[at].children
                at = children[label] if 0 <= label < len(children) else -1
        return found

    def place_newcomers(
        self, round_id: int, table: ClientTable, number: int, rows: IntArray, models: IntArray
    ) -> None:
        """Label clients that trained an anchor; they are members of their part from now on.

        A client that is like no part gets none, and another try.
        """
        anchor = self.anchors[number]
        children = np.array(self.tree.nodes[number].children, dtype=np.int64)
        for model in np.unique(models).tolist():
            if model not in anchor.views:
                continue
            assert table.sketch is not None
            part = rows[models == model]
            clients = table.clients[part]
            rewards = np.minimum(self.table.rewards(clients), 0.0)
            closed = self.table.tried(clients)[:, children] & (rewards[:, children] < 0)
            sketch = table.sketch[part].astype(np.float64)
            labels, next_best = anchor.views[model].place(sketch, closed)
            self.table.set_labels(clients, number, labels, round_id)
            self.table.note_placement(clients, round_id)
            # Where the nearest part refuses the client, the next one is tried without an anchor.
            for found, reward in ((next_best, SECOND_PART), (labels, FIRST_PART)):
                some = np.flatnonzero(found >= 0)
                rewards[some, children[found[some]]] = reward
            self.table.set_rewards(clients, rewards, round_id)

    def consider_split(self, round_id: int, cohort: Cohort) -> Anchor | None:
        """Decide before the server step; the anchor is what this round started from."""
        sizes = self.table.part_sizes(cohort.number, cohort.parts)
        leaves = len(self.tree.leaves)
        report = cohort.decide(round_id, sizes, leaves, cohort.participants)
        self.reports[cohort.number] = report
        if not report.go:
            return None
        anchor = cohort.anchor(self.table)
        anchor.line = self.copy_of(cohort.line)
        return anchor

    def split(self, round_id: int, cohort: Cohort, anchor: Anchor) -> None:
        """Children start from the weights and optimiser of the cohort, after its server step."""
        children = self.tree.split(cohort.number, cohort.parts, round_id + 1)
        fresh = [
            child
            for place, child in enumerate(children)
            if self.table.refused_share(cohort.number, place) > 0.5
        ]
        self.foundlings += fresh
        self.table.add_cohorts(len(children))
        self.table.inherit(cohort.number, children, fresh)
        for child in children:
            self.add_cohort(child, self.copy_of(cohort.line), round_id + 1)
            self.cohorts[child].inherit(cohort, anchor)
        evidence = plain(self.reports[cohort.number])
        self.log(round_id, "split", cohort=cohort.number, into=children, evidence=evidence)
        self.anchors[cohort.number] = anchor
        cohort.line = anchor.line

    def maybe_merge(self, round_id: int, anchored: float) -> None:
        """Merge leaves that have been too small for too long; ``anchored``: devices at anchors."""
        if not self.config.merge_after:
            return
        # Devices that train an anchor are missing in the leaves, but only for a while.
        needed = self.config.p_min * (1 - anchored)
        for leaf in self.tree.leaves:
            cohort = self.cohorts[leaf]
            small = cohort.participants < needed and len(self.tree.leaves) > 1
            cohort.small_rounds = cohort.small_rounds + 1 if small else 0
        for leaf in self.tree.leaves:
            into = self._nearest(leaf)
            if into is None or self.cohorts[leaf].small_rounds < self.config.merge_after:
                continue
            self._merge(round_id, leaf, into)

    def _nearest(self, leaf: int) -> int | None:
        """Where a leaf's members would be least out of place.

        Of several siblings the one that has trained away from their parent in the most similar
        direction: a group that was cut in two is made whole this way. Else the nearest leaf.
        """
        parent = self.tree.nodes[leaf].parent
        children = self.tree.nodes[parent].children if parent >= 0 else []
        others = [n for n in children if n != leaf and n in self.tree.leaves]
        if len(others) < 2:
            return self.tree.nearest_leaf(leaf)
        start = self.line(parent).weights(0)
        moved = {n: direction(self.line(n).weights(0) - start) for n in (leaf, *others)}
        return max(others, key=lambda n: float(moved[leaf] @ moved[n]))

    def _merge(self, round_id: int, leaf: int, into: int) -> None:
        """Average the weights by members and hand the clients over."""
        active = self.members()
        share = active[leaf] / max(active[leaf] + active[into], 1.0)
        mine, other = (self.cohorts[n].line.state() for n in (leaf, into))
        other.update(averaged(mine, other, share))
        self.cohorts[into].line.load(other)
        self.tree.merge(leaf, into)
        self.table.absorb(leaf, into)
        self.log(round_id, "merged", cohort=leaf, into=into, share=share)

    def copy_of(self, line: Strategy) -> Strategy:
        """A line with the same weights and optimiser, from now on independent."""
        copy = self._make_inner()
        copy.start(self.facts)
        copy.load({name: np.array(value) for name, value in line.state().items()})
        return copy

    def add_cohort(self, number: int, line: Strategy, born: int) -> None:
        """Begin a cohort whose line is ready."""
        seed = 0 if self._facts is None else self._facts.seed
        self.cohorts[number] = Cohort(number, line, born, self.config, seed)

    def log(self, round_id: int, kind: str, **facts: Any) -> None:
        """Write an event down."""
        self.events.append({"round": round_id, "event": kind, **facts})

    def export(self) -> StateArrays:
        """Tree and records, for another job over the same clients."""
        records = {f"table.{name}": value for name, value in self.table.state().items()}
        return {"tree": self.tree.state(), **records}

    def adopt(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Start from known cohorts: every leaf begins with this job's own initial model."""
        line = self.line(ROOT)
        self.tree.load(state["tree"])
        self.table.load(strip(state, "table."))
        self.cohorts.clear()
        self.anchors.clear()
        for number in [ROOT, *self.tree.leaves]:
            self.add_cohort(number, self.copy_of(line), 0)

    def state(self) -> StateArrays:
        """Tree, records, and every cohort with its line."""
        parts = self.export()
        for number, cohort in self.cohorts.items():
            inner = cohort.line.state()
            parts |= {f"cohort{number}.line.{name}": value for name, value in inner.items()}
            parts |= {f"cohort{number}.{name}": value for name, value in cohort.state().items()}
        for number, anchor in self.anchors.items():
            parts |= {f"anchor{number}.{name}": value for name, value in anchor.state().items()}
        reports = [dataclasses.asdict(report) for report in self.reports.values()]
        return {
            **parts,
            "reports": np.frombuffer(json.dumps(reports).encode(), dtype=np.uint8).copy(),
            "gathering": np.array([self.gathering, *self.foundlings], dtype=np.int64),
            "anchors": np.array(list(self.anchors), dtype=np.int64),
            "cohorts": np.array(list(self.cohorts), dtype=np.int64),
        }

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore :meth:`state`."""
        self.tree.load(state["tree"])
        self.table.load(strip(state, "table."))
        self.cohorts.clear()
        self.anchors.clear()
        for number in state["cohorts"].tolist():
            line = self._make_inner()
            line.start(self.facts)
            line.load(strip(state, f"cohort{number}.line."))
            self.add_cohort(number, line, 0)
            self.cohorts[number].load(strip(state, f"cohort{number}."))
        self.gathering, *self.foundlings = (int(n) for n in state["gathering"])
        known = json.loads(state["reports"].tobytes()) if "reports" in state else []
        self.reports = {facts["cohort"]: SplitReport.from_facts(facts) for facts in known}
        for number in state["anchors"].tolist():
            views = views_from(strip(state, f"anchor{number}."))
            self.anchors[number] = Anchor(self.line(number), views)
