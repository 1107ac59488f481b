"""One cohort while it trains: its model line, the labels of its clients, and whether to split it.

Clustering runs per model of the cohort (an ensemble or a family has several), because updates from
different weights cannot be compared; the labels are the clients', so that every model sees the
same ones.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from raysys.federated.auxo.affinity import AffinityTable
from raysys.federated.auxo.anchor import Anchor, anchor_view
from raysys.federated.auxo.clustering import (
    kmeans,
    leave_one_out,
    split_half_stability,
    unit_rows,
)
from raysys.federated.auxo.config import AuxoConfig
from raysys.federated.auxo.evidence import (
    Dispersion,
    SignalSpace,
    dispersion,
    dispersion_terms,
    literal_criterion,
)

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
STABILITY_EVERY = 2
FEWEST_VALUES = 3
NEAR_BEST = 0.05
LOW_AGREEMENT, LOW_ROUNDS = 0.7, 5
RATIO_MEMORY = 512
TOO_SMALL = "one part would be too small"
SMALL_ROUNDS, ASIDE_ROUNDS = 20, 40


@dataclasses.dataclass(frozen=True, slots=True)
class View:
    """Participants of one model in one round: ids, sketches [n, D], and first halves or None."""

    model: int
    clients: IntArray
    sketch: FloatArray
    first: FloatArray | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SplitReport:
    """Everything a split decision rests on, and the verdict in words."""

    cohort: int
    round_id: int
    stability: dict[int, float]
    parts: int
    agreement: float
    coverage: float
    dispersion: Dispersion
    literal: bool
    participants: float
    shares: tuple[float, ...]
    verdict: str

    @property
    def go(self) -> bool:
        """Whether the cohort is to be split."""
        return self.verdict == "split"

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> SplitReport:
        """The report that ``dataclasses.asdict`` was given, also after a journey through JSON."""
        return cls(
            **{
                **facts,
                "stability": {int(k): v for k, v in facts["stability"].items()},
                "dispersion": Dispersion(**facts["dispersion"]),
                "shares": tuple(facts["shares"]),
            }
        )


class Cohort:
    """Clustering state of one leaf; ``line`` is the strategy that trains its model or models."""

    def __init__(self, number: int, line: Any, born: int, config: AuxoConfig, seed: int) -> None:
        self.number = number
        self.line = line
        self.born = born
        self.opened = born
        self.small_rounds = 0
        self.parts = 2 if config.rules.k_choice == "two" else 0
        self.ratios: collections.deque[float] = collections.deque(maxlen=RATIO_MEMORY)
        self._config = config
        self._seed = seed
        self._spaces: dict[int, SignalSpace] = {}
        window = config.window
        self._stability: dict[int, collections.deque[float]] = {
            k: collections.deque(maxlen=window) for k in range(2, config.k_max + 1)
        }
        self._agreement: collections.deque[float] = collections.deque(maxlen=window)
        self._coverage: collections.deque[float] = collections.deque(maxlen=window)
        self._participants: collections.deque[float] = collections.deque(maxlen=10)
        self._terms: collections.deque[tuple[FloatArray, FloatArray]] = collections.deque(
            maxlen=window
        )
        self._rejections: collections.deque[float] = collections.deque(maxlen=5)
        self._last: list[View] = []
        self._literal = False
        self._low = 0
        # By number of parts: rounds with one too small, and the round in which that was too many.
        self._small: dict[int, int] = {}
        self._aside: dict[int, int] = {}

    @property
    def rejections(self) -> float:
        """Share of members that did not fit, over the last five rounds; 0 before there are five."""
        return _mean(self._rejections) if len(self._rejections) == 5 else 0.0

    def note_rejections(self, share: float) -> None:
        """Take a round's share of members with a negative reward."""
        self._rejections.append(share)

    @property
    def participants(self) -> float:
        """Mean participants of the last ten rounds."""
        return _mean(self._participants)

    def observe(self, round_id: int, views: list[View], table: AffinityTable) -> None:
        """Take a round's updates: learn directions, choose the number of parts, label clients."""
        self._participants.append(float(sum(len(view.clients) for view in views)))
        views = [view for view in views if len(view.clients) >= 4]
        self._last = views
        if round_id < self._config.start_round or not views:
            return
        rng = np.random.default_rng([self._seed, self.number, round_id])
        units = [unit_rows(view.sketch) for view in views]
        for view, unit in zip(views, units):
            space = self._spaces.get(view.model)
            if space is None or len(space.cross) != unit.shape[1]:
                space = SignalSpace(unit.shape[1], self._config.subspace_decay)
                self._spaces[view.model] = space
            space.add(unit, view.first, view.sketch)
        largest = max(range(len(views)), key=lambda place: len(views[place].clients))
        self._choose(round_id, views[largest], units[largest], table, rng)
        if self.parts:
            self._label(round_id, views, units, largest, table, rng)

    def anchor(self, table: AffinityTable) -> Anchor:
        """What a split now would leave behind: the line as this round found it, and its parts.

        Call it before the line's server step.
        """
        views = {}
        for view in self._last:
            labels = table.labels(view.clients, self.number)
            if len(np.unique(labels[labels >= 0])) < self.parts:
                continue
            unit = unit_rows(view.sketch)
            raw = self._config.rules.features == "raw"
            whole = np.eye(unit.shape[1])
            basis = whole if raw else self._spaces[view.model].basis(self.parts)
            views[view.model] = anchor_view(view.sketch, unit, labels, basis, self.parts)
        return Anchor(self.line, views)

    def inherit(self, parent: Cohort, anchor: Anchor) -> None:
        """Start from the directions that a parent knew, without those that told its parts apart."""
        for model, view in anchor.views.items():
            if model in parent._spaces:
                spread = (view.centroids - view.centroids.mean(axis=0)) @ view.basis.T
                self._spaces[model] = parent._spaces[model].without(spread)

    def decide(
        self, round_id: int, sizes: IntArray, leaves: int, clients_per_round: float
    ) -> SplitReport:
        """Whether to split now.

        Args:
            sizes: labelled clients of each part. leaves: cohorts that train now.
            clients_per_round: participants that this cohort can count on.
        """
        rng = np.random.default_rng([self._seed, self.number, round_id, 1])
        terms = [np.concatenate(part) for part in zip(*self._terms)] or [np.zeros(0)] * 2
        found = dispersion(terms[0], terms[1], rng)
        shares = tuple(float(size) / max(int(sizes.sum()), 1) for size in sizes)
        report = SplitReport(
            cohort=self.number,
            round_id=round_id,
            stability={k: _mean(values) for k, values in self._stability.items() if values},
            parts=self.parts,
            agreement=_mean(self._agreement),
            coverage=_mean(self._coverage),
            dispersion=found,
            literal=self._literal,
            participants=clients_per_round,
            shares=shares,
            verdict="",
        )
        verdict = self._verdict(report, leaves)
        if verdict == TOO_SMALL:
            self._note_small(round_id)
        return dataclasses.replace(report, verdict=verdict)

    def _note_small(self, round_id: int) -> None:
        """Few labels make true parts look small at first, so patience comes before the verdict."""
        self._small[self.parts] = self._small.get(self.parts, 0) + 1
        if self._small[self.parts] >= SMALL_ROUNDS:
            del self._small[self.parts]
            self._aside[self.parts] = round_id

    def _verdict(self, report: SplitReport, leaves: int) -> str:
        """The first condition that is not met, in the order in which they come to hold."""
        config, gate = self._config, self._config.rules.gate
        found, parts = report.dispersion, report.parts
        doubtful = len(self._agreement) < config.window or report.agreement < config.agree_min
        scattered = found.usable and found.ratio > config.dispersion_max
        obstacles = {
            "no stable number of parts": not parts,
            "too many cohorts already": leaves + parts - 1 > config.max_leaves,
            "labels do not agree with earlier ones yet": doubtful,
            "too few of the clients that check in have a label": report.coverage < config.cover,
            "the parts are as scattered as the whole": gate == "corrected" and scattered,
            "the printed criterion is not met": gate == "literal" and not report.literal,
            "too few participants for so many parts": report.participants < parts * config.p_min,
            TOO_SMALL: min(report.shares, default=0.0) < config.min_share,
        }
        return next((text for text, holds in obstacles.items() if holds), "split")

    def _choose(
        self,
        round_id: int,
        view: View,
        unit: FloatArray,
        table: AffinityTable,
        rng: np.random.Generator,
    ) -> None:
        """Choose the number of parts by stability; re-seed where it changes or labels disagree."""
        if self._config.rules.k_choice == "stability" and round_id % STABILITY_EVERY == 0:
            for k, values in self._stability.items():
                values.append(split_half_stability(self._points(view.model, unit, k), k, rng))
            best = self._most_stable(round_id)
            if best != self.parts:
                self._restart(best, table)
        if self._low >= LOW_ROUNDS:
            self._restart(self.parts, table)

    def _most_stable(self, round_id: int) -> int:
        """The largest K that is stable enough and stands out; 0 for none.

        It stands out if its stability is close to the best, or above that of both its neighbours:
        where two of four groups are alike, two parts are stable before four are, three never. The
        largest K above a fixed bar would take five parts for four groups, since cutting one true
        group in two loses little stability.

        A K with a part too small to stand alone (clients that send false labels are such a part)
        would hold up the split of the others for ever; it and every finer K are set aside for a
        while where a coarser one does.
        """
        means = {k: _mean(v) for k, v in self._stability.items() if len(v) >= FEWEST_VALUES}
        aside = [k for k, since in self._aside.items() if round_id - since < ASIDE_ROUNDS]
        coarser = {k: value for k, value in means.items() if k < min(aside, default=k + 1)}
        return self._standing_out(coarser) or self._standing_out(means)

    def _standing_out(self, means: dict[int, float]) -> int:
        best = max(means.values(), default=0.0)
        return max(
            (
                k
                for k, value in means.items()
                if value >= self._config.stab_min
                and (
                    value >= best - NEAR_BEST
                    or value >= max(means.get(k - 1, 0.0), means.get(k + 1, 0.0)) + NEAR_BEST
                )
            ),
            default=0,
        )

    def _restart(self, parts: int, table: AffinityTable) -> None:
        table.clear_labels(self.number)
        self.parts = parts
        self._low = 0
        for window in (self._agreement, self._coverage, self._terms):
            window.clear()

    def _label(
        self,
        round_id: int,
        views: list[View],
        units: list[FloatArray],
        largest: int,
        table: AffinityTable,
        rng: np.random.Generator,
    ) -> None:
        known, same, met = 0, 0, 0
        for place, (view, unit) in enumerate(zip(views, units)):
            before = table.labels(view.clients, self.number)
            points = self._points(view.model, unit, self.parts)
            if (before >= 0).any():
                after = leave_one_out(points, before, self.parts, self._config.rules.own_centroid)
            elif place == largest:
                after = kmeans(points, self.parts, rng)[0]
            else:  # labels come from the model that has most participants
                continue
            known += int((before >= 0).sum())
            same += int(((before >= 0) & (before == after)).sum())
            met += len(before)
            table.set_labels(view.clients, self.number, after, round_id)
            if place == largest:
                self._literal = literal_criterion(view.sketch, before, self.parts)
                if view.first is not None:
                    second = view.sketch - view.first
                    self._terms.append(dispersion_terms(view.first, second, before))
        if met:
            self._coverage.append(known / met)
        if known >= FEWEST_VALUES:
            self._agreement.append(same / known)
            self._low = self._low + 1 if same / known < LOW_AGREEMENT else 0

    def _points(self, model: int, unit: FloatArray, k: int) -> FloatArray:
        if self._config.rules.features == "raw":
            return unit
        return self._spaces[model].project(unit, k)

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Clustering state as arrays; the line's own state is kept beside it."""
        numbers = [self.number, self.born, self.opened, self.small_rounds, self.parts, self._low]
        return {
            "numbers": np.array([*numbers, int(self._literal)], dtype=np.int64),
            "ratios": np.array(self.ratios, dtype=np.float64),
            "agreement": np.array(self._agreement, dtype=np.float64),
            "coverage": np.array(self._coverage, dtype=np.float64),
            "participants": np.array(self._participants, dtype=np.float64),
            "rejections": np.array(self._rejections, dtype=np.float64),
            "small": np.array(list(self._small.items()), dtype=np.int64).reshape(-1, 2),
            "aside": np.array(list(self._aside.items()), dtype=np.int64).reshape(-1, 2),
            "terms": _ragged([t for t, _ in self._terms]),
            "terms.within": _ragged([w for _, w in self._terms]),
            **{f"stability.{k}": np.array(v) for k, v in self._stability.items() if v},
            **{f"space.{m}": space.cross for m, space in self._spaces.items()},
        }

    def load(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """Restore :meth:`state`."""
        numbers = [int(number) for number in state["numbers"]]
        _, self.born, self.opened, self.small_rounds, self.parts, self._low, literal = numbers
        self._literal = bool(literal)
        for window, name in (
            (self.ratios, "ratios"), (self._agreement, "agreement"),
            (self._coverage, "coverage"), (self._participants, "participants"),
            (self._rejections, "rejections"),
        ):  # fmt: skip
            window.clear()
            window.extend(state[name].tolist())
        self._small = {int(k): int(rounds) for k, rounds in state.get("small", ())}
        self._aside = {int(k): int(at) for k, at in state.get("aside", ())}
        self._terms.clear()
        self._terms.extend(zip(_rows(state["terms"]), _rows(state["terms.within"])))
        for k, values in self._stability.items():
            values.clear()
            values.extend(state.get(f"stability.{k}", np.zeros(0)).tolist())
        self._spaces = {}
        for name, cross in state.items():
            if name.startswith("space."):
                space = SignalSpace(len(cross), self._config.subspace_decay)
                space.cross = np.array(cross)
                self._spaces[int(name.removeprefix("space."))] = space


def _mean(values: collections.deque[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _ragged(parts: list[FloatArray]) -> FloatArray:
    """Arrays of different length as one: the count, the lengths, the content."""
    lengths = np.array([len(parts), *[len(part) for part in parts]], dtype=np.float64)
    return np.concatenate([lengths, *parts])


def _rows(packed: npt.NDArray[Any]) -> list[FloatArray]:
    count = int(packed[0])
    lengths = packed[1 : 1 + count].astype(np.int64)
    parts = np.split(np.array(packed[1 + count :], dtype=np.float64), np.cumsum(lengths)[:-1])
    return parts if count else []
