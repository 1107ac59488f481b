"""Affinity records: how well a client fits each cohort it knows, and which part it belongs to.

Soft state. In deployment a record lives on the device and comes back with its check-in; here a
table keeps the records of the clients seen, twelve bytes per cohort and client. Whatever comes from
outside is cleaned: a record is a wish, never an order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
NONE = -1
LOWEST, HIGHEST = -10.0, 1.0
MOST_PLACEMENTS = 2


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AffinityEntry:
    """One line of a record: cohort, reward R in [-10, 1], label L in that cohort or -1, and
    whether the client trained there."""

    cohort: int
    reward: float
    label: int = NONE
    tried: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AffinityRecord:
    """What a device brings to its check-in; an empty one is that of a newcomer.

    ``round_id`` is the round of its last feedback.
    """

    entries: tuple[AffinityEntry, ...] = ()
    round_id: int = NONE


class AffinityTable:
    """Records of the clients seen: rewards float32 [rows, cohorts], labels int8 [rows, cohorts].

    Args:
        n_clients: size of the population; more may join. max_records: most rows kept, or None.
    """

    def __init__(self, n_clients: int, max_records: int | None = None) -> None:
        self._row_of = np.full(n_clients, NONE, dtype=np.int32)
        self._max = max_records
        self._used = 0
        self.clients = np.zeros(0, dtype=np.int64)
        self._reward = np.zeros((0, 1), dtype=np.float32)
        self._label = np.zeros((0, 1), dtype=np.int8)
        self._tried = np.zeros((0, 1), dtype=bool)
        self._placed = np.zeros(0, dtype=np.uint8)
        self._seen = np.zeros(0, dtype=np.int32)
        self._strikes = np.zeros(0, dtype=np.uint8)
        self._blocked = np.zeros(0, dtype=bool)

    @property
    def cohorts(self) -> int:
        """Number of columns."""
        return self._reward.shape[1]

    @property
    def used(self) -> int:
        """Number of records."""
        return self._used

    def add_cohorts(self, count: int) -> None:
        """Make columns for new cohorts: reward 0, no label."""
        rows = len(self._reward)
        self._reward = np.hstack([self._reward, np.zeros((rows, count), dtype=np.float32)])
        self._label = np.hstack([self._label, np.full((rows, count), NONE, dtype=np.int8)])
        self._tried = np.hstack([self._tried, np.zeros((rows, count), dtype=bool)])

    def rewards(self, clients: IntArray) -> FloatArray:
        """Rewards [k, cohorts]; zeros for a client without a record."""
        rows = self._rows(clients)
        found = self._reward[rows] if len(self._reward) else np.zeros((len(rows), self.cohorts))
        return np.where(rows[:, None] >= 0, found, 0.0).astype(np.float64)

    def labels(self, clients: IntArray, cohort: int) -> IntArray:
        """Labels of one cohort, int64 [k]; NONE for a client without one."""
        rows = self._rows(clients)
        found = self._label[rows, cohort] if len(self._label) else np.full(len(rows), NONE)
        return np.where(rows >= 0, found, NONE).astype(np.int64)

    def part_sizes(self, cohort: int, parts: int) -> IntArray:
        """Clients with each label of a cohort, int64 [parts]."""
        if not parts:  # a pass over all records, for nothing
            return np.zeros(0, dtype=np.int64)
        labels = self._label[: self._used, cohort]
        return np.bincount(labels[labels >= 0], minlength=parts)[:parts]

    def known(self, clients: IntArray) -> npt.NDArray[np.bool_]:
        """Which clients have a record."""
        there: npt.NDArray[np.bool_] = self._rows(clients) >= 0
        return there

    def tried(self, clients: IntArray) -> npt.NDArray[np.bool_]:
        """In which cohorts clients have trained, bool [k, cohorts]."""
        rows = self._rows(clients)
        found = self._tried[rows] if len(self._tried) else np.zeros((len(rows), self.cohorts), bool)
        return np.where(rows[:, None] >= 0, found, False)

    def mark_tried(self, clients: IntArray, cohort: int, round_id: int) -> None:
        """Note that clients have trained in a cohort."""
        rows = self._make(clients, round_id)
        self._tried[rows, cohort] = True

    def placements(self, clients: IntArray) -> IntArray:
        """How often an anchor has placed each client, int64 [k]."""
        rows = self._rows(clients)
        found = self._placed[rows] if len(self._placed) else np.zeros(len(rows))
        return np.where(rows >= 0, found, 0).astype(np.int64)

    def note_placement(self, clients: IntArray, round_id: int) -> None:
        """Count a placement by an anchor."""
        rows = self._make(clients, round_id)
        self._placed[rows] = np.minimum(self._placed[rows], 254) + 1

    def exhaust(self, clients: IntArray, placements: int) -> None:
        """Let clients that an anchor has placed count as placed as often as is allowed."""
        rows = self._rows(clients)
        rows = rows[rows >= 0]
        known = self._placed[rows] > 0
        self._placed[rows[known]] = placements

    def settle(self, clients: IntArray) -> None:
        """Forget how often clients were placed: they are at home, and may drift again."""
        rows = self._rows(clients)
        self._placed[rows[rows >= 0]] = 0

    def blocked(self, clients: IntArray) -> npt.NDArray[np.bool_]:
        """Which clients are on the block list."""
        rows = self._rows(clients)
        found = self._blocked[rows] if len(self._blocked) else np.zeros(len(rows), dtype=bool)
        return np.where(rows >= 0, found, False)

    def set_rewards(self, clients: IntArray, values: FloatArray, round_id: int) -> None:
        """Write rewards [k, cohorts], kept within [-10, 1]; makes records where there are none."""
        rows = self._make(clients, round_id)
        clean = np.nan_to_num(values, nan=0.0, posinf=HIGHEST, neginf=LOWEST)
        self._reward[rows] = np.clip(clean, LOWEST, HIGHEST)

    def set_labels(self, clients: IntArray, cohort: int, labels: IntArray, round_id: int) -> None:
        """Write labels of one cohort."""
        rows = self._make(clients, round_id)  # may replace the arrays, so it comes first
        self._label[rows, cohort] = labels

    def clear_labels(self, cohort: int) -> None:
        """Forget every label of a cohort."""
        self._label[:, cohort] = NONE

    def refused_share(self, cohort: int, label: int) -> float:
        """Share of a part's clients that the whole cohort has tried and not accepted."""
        mine = self._label[:, cohort] == label
        refused = mine & self._tried[:, cohort] & (self._reward[:, cohort] < 0)
        return float(refused.sum() / max(int(mine.sum()), 1))

    def inherit(self, cohort: int, children: list[int], fresh: list[int]) -> None:
        """Rewards of a split: R of the parent, and for labelled clients 0.1 more in their part.

        A labelled client belongs to its part even where the whole had refused it: it is the
        newcomers' own part then. To the other parts nobody belongs yet, and a client without a
        label to none. Parts in ``fresh`` are new to everybody: what the cohort refused may be
        just what they are. (Ours; the printed rule gives everybody R in every part.)
        """
        own, label = self._reward[:, cohort], self._label[:, cohort]
        for place, child in enumerate(children):
            mine = np.maximum(own, 0) + 0.1
            other = np.zeros_like(own) if child in fresh else np.minimum(own, 0)
            self._reward[:, child] = np.where(label == place, mine, other)

    def absorb(self, cohort: int, into: int) -> None:
        """Rewards of a merge: the better of the two."""
        self._reward[:, into] = np.maximum(self._reward[:, into], self._reward[:, cohort])

    def strike(self, clients: IntArray, hit: npt.NDArray[np.bool_], round_id: int) -> IntArray:
        """Shift the last four judgements; who has three strikes among them is blocked.

        Returns:
            Clients that were blocked just now.
        """
        rows = self._make(clients, round_id)
        shifted = ((self._strikes[rows].astype(np.int64) << 1) | hit) & 0b1111
        self._strikes[rows] = shifted
        bits = (shifted[:, None] >> np.arange(4)) & 1
        fresh = (bits.sum(axis=1) >= 3) & ~self._blocked[rows]
        self._blocked[rows] |= fresh
        blocked: IntArray = clients[fresh]
        return blocked

    def record(self, client: int) -> AffinityRecord:
        """A client's record as it would travel."""
        row = int(self._rows(np.array([client]))[0])
        if row < 0:
            return AffinityRecord()
        entries = tuple(
            AffinityEntry(
                cohort=c,
                reward=float(self._reward[row, c]),
                label=int(self._label[row, c]),
                tried=bool(self._tried[row, c]),
            )
            for c in range(self.cohorts)
        )
        return AffinityRecord(entries=entries, round_id=int(self._seen[row]))

    def accept(self, client: int, record: AffinityRecord, round_id: int) -> bool:
        """Take a record that came with a check-in; False where all or part of it was refused.

        A record from the future is refused whole; an entry with an unknown cohort, a reward that is
        not a number, or a label out of range is left out; rewards are kept within [-10, 1].
        """
        if record.round_id > round_id:
            return False
        ids = np.array([client], dtype=np.int64)
        rewards = np.zeros((1, self.cohorts))
        labels = np.full(self.cohorts, NONE, dtype=np.int64)
        tried = np.zeros(self.cohorts, dtype=bool)
        good = True
        for entry in record.entries:
            usable = 0 <= entry.cohort < self.cohorts and bool(np.isfinite(entry.reward))
            usable = usable and NONE <= entry.label < 16
            good &= usable
            if usable:
                rewards[0, entry.cohort] = entry.reward
                labels[entry.cohort] = entry.label
                tried[entry.cohort] = entry.tried
        self.set_rewards(ids, rewards, round_id)
        row = self._row_of[client]
        self._label[row], self._tried[row] = labels, tried
        return good

    def forget(self, clients: IntArray) -> None:
        """Lose the records of some clients, as a device that was reset does."""
        rows = self._rows(clients)
        rows = rows[rows >= 0]
        self._reward[rows] = 0.0
        self._label[rows] = NONE
        self._tried[rows] = False
        self._placed[rows] = 0

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """All records as arrays."""
        used = self._used
        return {
            "clients": self.clients[:used],
            "reward": self._reward[:used],
            "label": self._label[:used],
            "tried": self._tried[:used],
            "placed": self._placed[:used],
            "seen": self._seen[:used],
            "strikes": self._strikes[:used],
            "blocked": self._blocked[:used],
        }

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore :meth:`state`."""
        self.clients = np.array(state["clients"], dtype=np.int64)
        self._reward = np.array(state["reward"], dtype=np.float32)
        self._label = np.array(state["label"], dtype=np.int8)
        self._tried = np.array(state["tried"], dtype=bool)
        self._placed = np.array(state["placed"], dtype=np.uint8)
        self._seen = np.array(state["seen"], dtype=np.int32)
        self._strikes = np.array(state["strikes"], dtype=np.uint8)
        self._blocked = np.array(state["blocked"], dtype=bool)
        self._used = len(self.clients)
        most = max(len(self._row_of), int(self.clients.max(initial=-1)) + 1)
        self._row_of = np.full(most, NONE, dtype=np.int32)
        self._row_of[self.clients] = np.arange(self._used, dtype=np.int32)

    def _rows(self, clients: IntArray) -> IntArray:
        """Row of each client, NONE for one without a record, also one that joined later."""
        if int(clients.max(initial=-1)) < len(self._row_of):
            return self._row_of[clients].astype(np.int64)
        inside = clients < len(self._row_of)
        found = np.full(len(clients), NONE, dtype=np.int64)
        found[inside] = self._row_of[clients[inside]]
        return found

    def _make(self, clients: IntArray, round_id: int) -> IntArray:
        """Rows of clients, made where missing; marks them as seen."""
        missing = int(clients.max(initial=-1)) + 1 - len(self._row_of)
        if missing > 0:  # clients that joined after the job had begun
            later = np.full(missing, NONE, dtype=np.int32)
            self._row_of = np.concatenate([self._row_of, later])
        fresh = clients[self._row_of[clients] < 0]
        if len(fresh):
            if self._max is not None and self._used + len(fresh) > self._max:
                self._expire(len(fresh), clients)
            self._grow(self._used + len(fresh))
            rows = np.arange(self._used, self._used + len(fresh))
            self.clients[rows] = fresh
            self._row_of[fresh] = rows
            self._used += len(fresh)
        found = self._row_of[clients].astype(np.int64)
        self._seen[found] = round_id
        return found

    def _expire(self, wanted: int, keep: IntArray) -> None:
        """Drop the longest unseen records, a quarter of the table at least."""
        assert self._max is not None
        count = max(wanted, self._max // 4)
        order = np.lexsort((self.clients[: self._used], self._seen[: self._used]))
        order = order[~np.isin(self.clients[order], keep)]
        gone = np.zeros(self._used, dtype=bool)
        gone[order[:count]] = True
        kept = {name: part[~gone] for name, part in self.state().items()}
        self.load(kept)

    def _grow(self, rows: int) -> None:
        missing = max(rows, 2 * len(self.clients)) - len(self.clients)
        if rows <= len(self.clients) or missing <= 0:
            return
        cohorts = self.cohorts
        self.clients = np.concatenate([self.clients, np.full(missing, NONE, dtype=np.int64)])
        self._reward = np.vstack([self._reward, np.zeros((missing, cohorts), dtype=np.float32)])
        self._label = np.vstack([self._label, np.full((missing, cohorts), NONE, dtype=np.int8)])
        self._tried = np.vstack([self._tried, np.zeros((missing, cohorts), dtype=bool)])
        self._placed = np.concatenate([self._placed, np.zeros(missing, dtype=np.uint8)])
        self._seen = np.concatenate([self._seen, np.zeros(missing, dtype=np.int32)])
        self._strikes = np.concatenate([self._strikes, np.zeros(missing, dtype=np.uint8)])
        self._blocked = np.concatenate([self._blocked, np.zeros(missing, dtype=bool)])
