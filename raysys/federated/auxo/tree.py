"""The tree of cohorts: who split into whom, how far apart two are, where a request leads."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from raysys.errors import ConfigError

IntArray = npt.NDArray[np.int64]
ROOT = 0


@dataclasses.dataclass(slots=True)
class Node:
    """One cohort: its parent (-1 for the root), its children in label order, when it began.

    ``merged_into`` is the cohort that took its members, or -1.
    """

    parent: int
    born: int
    children: list[int] = dataclasses.field(default_factory=list)
    merged_into: int = -1


class CohortTree:
    """Cohorts by number, in order of creation; numbers are never used again."""

    def __init__(self) -> None:
        self.nodes = [Node(-1, 0)]

    @property
    def leaves(self) -> list[int]:
        """Cohorts that train, in order of creation."""
        return [n for n, node in enumerate(self.nodes) if self._trains(node)]

    def split(self, cohort: int, parts: int, round_id: int) -> list[int]:
        """Turn a leaf into an inner node with ``parts`` children; returns their numbers."""
        if cohort not in self.leaves or parts < 2:
            raise ConfigError("cohort", (cohort, parts), "a leaf, and at least two parts")
        children = list(range(len(self.nodes), len(self.nodes) + parts))
        self.nodes += [Node(cohort, round_id) for _ in children]
        self.nodes[cohort].children = children
        return children

    def merge(self, cohort: int, into: int) -> None:
        """Close a leaf; whoever asks for it is sent to another leaf."""
        if cohort == into or {cohort, into} - set(self.leaves):
            raise ConfigError("cohort", (cohort, into), "two different leaves")
        self.nodes[cohort].merged_into = into

    def nearest_leaf(self, cohort: int) -> int | None:
        """The closest other leaf in the tree, the older one first; None for the only leaf."""
        others = [leaf for leaf in self.leaves if leaf != cohort]
        return min(others, key=lambda q: (self.distance(cohort, q), q)) if others else None

    def resolve(self, cohort: int, labels: Sequence[int] | IntArray, draw: int) -> int:
        """The leaf that a request for any cohort leads to.

        Args:
            labels: the client's label in each cohort, by number; -1 or missing for none.
            draw: a number that decides where there is no label.

        A cohort that was never issued leads to the root, as an unknown client's request does.
        """
        at = cohort if 0 <= cohort < len(self.nodes) else ROOT
        while not self._trains(self.nodes[at]):
            node = self.nodes[at]
            if node.merged_into >= 0:
                at = node.merged_into
                continue
            label = int(labels[at]) if at < len(labels) else -1
            inside = 0 <= label < len(node.children)
            at = node.children[label if inside else draw % len(node.children)]
        return at

    def distance(self, cohort: int, other: int) -> int:
        """Hops from ``cohort`` up to the lowest common ancestor (paper, section 4.3)."""
        above = set(self._line(other))
        return next(hops for hops, node in enumerate(self._line(cohort)) if node in above)

    def name(self, cohort: int) -> str:
        """Path from the root, such as "0.1.0"."""
        line = self._line(cohort)[::-1]
        steps = [str(self.nodes[a].children.index(b)) for a, b in itertools.pairwise(line)]
        return ".".join(["0", *steps])

    def state(self) -> IntArray:
        """Parent, birth, merge target and place among the children of every node, int64 [n, 4]."""
        rows = []
        for number, node in enumerate(self.nodes):
            siblings = [] if node.parent < 0 else self.nodes[node.parent].children
            place = siblings.index(number) if siblings else 0
            rows.append([node.parent, node.born, node.merged_into, place])
        return np.array(rows, dtype=np.int64)

    def load(self, rows: IntArray) -> None:
        """Restore :meth:`state`; children were numbered in label order."""
        self.nodes = [Node(int(p), int(b), [], int(m)) for p, b, m, _ in rows]
        for number, node in enumerate(self.nodes):
            if node.parent >= 0:
                self.nodes[node.parent].children.append(number)

    def _trains(self, node: Node) -> bool:
        return not node.children and node.merged_into < 0

    def _line(self, cohort: int) -> list[int]:
        line = [cohort]
        while self.nodes[line[-1]].parent >= 0:
            line.append(self.nodes[line[-1]].parent)
        return line
