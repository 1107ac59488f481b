"""O(N) accumulators of training dynamics, and the scores they give.

Batches are applied epoch by epoch in (rank, sequence) order, because forgetting depends on order;
a retried epoch replaces, never adds; an example counts once per epoch, so a sampler's padding
changes nothing. About 53 bytes per example, whatever the number of classes or epochs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from raysys.config import check_choice, check_range
from raysys.errors import ConfigError, RemoteError
from raysys.training.ccs.dynamics import StatBatch
from raysys.training.ccs.table import ScoreTable, check_ids

# Column -> dtype of the state, one row per example.
STATE: Mapping[str, str] = {
    "margin_sum": "f8",
    "el2n_sum": "f8",
    "p_sum": "f8",
    "p_square_sum": "f8",
    "visits": "i4",
    "el2n_visits": "i4",
    "right_count": "i4",
    "forgotten": "i4",
    "last_right": "i1",
    "label": "i4",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ScoringConfig:
    """How dynamics become scores.

    Args:
        el2n_epochs: EL2N sums over epochs 0 to ``el2n_epochs - 1``.
        never_learned: ``"hardest"`` gives examples that were never right one event more than the
            largest count (Toneva et al., ICLR 2019); ``"zero"`` is the released CCS code, which
            makes them look like the easiest.
        mean: divide AUM and EL2N by the visits, so that unequal visit counts compare.
    """

    el2n_epochs: int = 10
    never_learned: Literal["hardest", "zero"] = "hardest"
    mean: bool = True

    def __post_init__(self) -> None:
        check_range(self, "el2n_epochs", 1)
        check_choice(self, "never_learned", ("hardest", "zero"))


class ScoreAccumulator:
    """Running scores of a fixed set of examples.

    Args:
        ids: the examples, unique int64 in any order.

    Raises:
        ConfigError: bad ids; later, a batch that names an unknown id, changes a label, or comes
            for an epoch that is closed.
    """

    def __init__(self, ids: NDArray[np.int64], config: ScoringConfig | None = None) -> None:
        if len(ids) == 0:
            raise ConfigError("ids", 0, "at least one example")
        check_ids(ids)
        self.ids = np.sort(ids).astype(np.int64)
        self.config = config or ScoringConfig()
        self._dense = int(self.ids[-1]) - int(self.ids[0]) + 1 == len(ids)
        self._state = {name: np.zeros(len(ids), kind) for name, kind in STATE.items()}
        self._state["label"][:] = -1
        self._before: dict[str, NDArray[Any]] | None = None
        self._pending: dict[tuple[int, int, int], StatBatch] = {}
        self._committed_keys: set[tuple[int, int, int]] = set()
        self.committed_epoch = -1

    @property
    def state_bytes(self) -> int:
        """Bytes of the accumulators (without the copy kept for one epoch's rollback)."""
        return sum(column.nbytes for column in self._state.values())

    def add(self, batch: StatBatch) -> None:
        """Take a batch in; sending the same (epoch, rank, sequence) again replaces it."""
        if batch.epoch <= self.committed_epoch:
            if batch.key in self._committed_keys or batch.epoch < self.committed_epoch:
                return  # a late retry of what is already counted
            remedy = f"Call reopen({batch.epoch}) to replay the epoch"
            raise ConfigError("epoch", batch.epoch, f"> {self.committed_epoch}", remedy)
        self._pending[batch.key] = batch

    def reopen(self, epoch: int) -> None:
        """Forget an epoch so that it can be recorded again after a failure.

        Raises:
            ConfigError: the epoch is older than the last committed one (restore a snapshot).
        """
        if epoch == self.committed_epoch and self._before is not None:
            self._state, self._before = self._before, None
            self.committed_epoch -= 1
            self._committed_keys = set()
        elif epoch <= self.committed_epoch:
            remedy = f"Load the snapshot taken after epoch {epoch - 1}"
            raise ConfigError("epoch", epoch, f">= {self.committed_epoch}", remedy)
        self._pending = {key: batch for key, batch in self._pending.items() if key[0] != epoch}

    def commit(self, epoch: int, expected: int | None = None) -> int:
        """Apply an epoch's batches in order; returns the examples that were visited.

        Committing an epoch again without :meth:`reopen` changes nothing and returns 0.

        Args:
            expected: number of batches that were sent; None takes what has come.

        Raises:
            RemoteError: fewer batches are pending than ``expected``; send them again.
        """
        if epoch <= self.committed_epoch:
            return 0
        keys = sorted(key for key in self._pending if key[0] <= epoch)
        if expected is not None and len(keys) < expected:
            reason = f"holds {len(keys)} of {expected} batches up to epoch {epoch}"
            raise RemoteError("score store", reason, "Send the epoch's batches again")
        self._before = {name: column.copy() for name, column in self._state.items()}
        visited = 0
        for each in sorted({key[0] for key in keys}):
            batches = [self._pending.pop(key) for key in keys if key[0] == each]
            visited = self._apply(each, batches)
        self.committed_epoch = epoch
        self._committed_keys = {key for key in keys if key[0] == epoch}
        return visited

    def _apply(self, epoch: int, batches: list[StatBatch]) -> int:
        ids = np.concatenate([batch.ids for batch in batches])
        rows = self._rows(ids)
        # The first visit counts; later ones in the epoch are a sampler's padding. Writing in
        # reverse leaves the first occurrence in place.
        first = np.full(len(self.ids), -1, np.int64)
        order = np.arange(len(rows))
        first[rows[::-1]] = order[::-1]
        once = first[rows] == order
        rows = rows[once]

        def column(name: str) -> NDArray[Any]:
            joined: NDArray[Any] = np.concatenate([getattr(b, name) for b in batches])[once]
            return joined

        self._check_labels(rows, column("labels"))
        self._count(epoch, rows, column)
        return len(rows)

    def _count(self, epoch: int, rows: NDArray[np.int64], column: Any) -> None:
        state = self._state
        p_true, right = column("p_true").astype(np.float64), column("right")
        state["margin_sum"][rows] += column("margin")
        state["p_sum"][rows] += p_true
        state["p_square_sum"][rows] += p_true * p_true
        state["visits"][rows] += 1
        if epoch < self.config.el2n_epochs:
            state["el2n_sum"][rows] += column("el2n")
            state["el2n_visits"][rows] += 1
        state["right_count"][rows] += right
        state["forgotten"][rows] += (state["last_right"][rows] > 0) & ~right
        state["last_right"][rows] = right

    def _check_labels(self, rows: NDArray[np.int64], labels: NDArray[np.int64]) -> None:
        known = self._state["label"][rows]
        changed = (known >= 0) & (known != labels)
        if changed.any() or (len(labels) and int(labels.min()) < 0):
            bad = self.ids[rows][changed | (labels < 0)][:5].tolist()
            remedy = "The data was shuffled or relabelled under its ids: give stable ids"
            raise ConfigError("labels", f"ids {bad}", "one label >= 0 per id, always", remedy)
        self._state["label"][rows] = labels

    def _rows(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        if self._dense:
            rows = ids - self.ids[0]
            unknown = (rows < 0) | (rows >= len(self.ids))
        else:
            rows = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
            unknown = self.ids[rows] != ids
        if unknown.any():
            remedy = "Give every example's id at the start"
            raise ConfigError("ids", ids[unknown][:5].tolist(), "known ids", remedy)
        found: NDArray[np.int64] = rows
        return found

    def running_aum(self) -> NDArray[np.float64]:
        """Mean margin of each example so far, ordered by id; 0 where there was no visit."""
        mean: NDArray[np.float64] = self._state["margin_sum"] / np.maximum(self._state["visits"], 1)
        return mean

    def state_dict(self) -> dict[str, Any]:
        """Committed state; what is pending is not in it (replay the epoch)."""
        columns = {name: column.copy() for name, column in self._state.items()}
        return {"ids": self.ids, "columns": columns, "committed_epoch": self.committed_epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            ConfigError: the state belongs to other examples.
        """
        if not np.array_equal(state["ids"], self.ids):
            raise ConfigError("ids", len(state["ids"]), "the same examples as this accumulator's")
        self._state = {name: np.asarray(state["columns"][name]).copy() for name in STATE}
        self.committed_epoch = int(state["committed_epoch"])
        self._before, self._pending, self._committed_keys = None, {}, set()

    def to_table(self, extra: Mapping[str, NDArray[np.float64]] | None = None) -> ScoreTable:
        """Scores of all examples (aum, el2n, forgetting, correctness, confidence), plus ``extra``.

        Raises:
            ConfigError: examples that were never visited; lists the first ids.
        """
        state, visits = self._state, self._state["visits"]
        if int(visits.min()) == 0:
            missing = self.ids[visits == 0][:5].tolist()
            remedy = "Record at least one full epoch, or score without these examples"
            raise ConfigError("visits", f"none for ids {missing}", "a visit to each id", remedy)
        return ScoreTable(
            self.ids,
            {**self._scores(state, visits), **(extra or {})},
            state["label"].astype(np.int64),
        )

    def _scores(
        self, state: Mapping[str, NDArray[Any]], visits: NDArray[np.int32]
    ) -> dict[str, NDArray[np.float64]]:
        forgetting = state["forgotten"].astype(np.float64)
        if self.config.never_learned == "hardest":
            forgetting[state["right_count"] == 0] = forgetting.max() + 1
        per_visit = visits if self.config.mean else np.ones_like(visits)
        per_early = np.maximum(state["el2n_visits"], 1) if self.config.mean else per_visit
        mean_p = state["p_sum"] / visits
        variance = np.maximum(state["p_square_sum"] / visits - mean_p**2, 0)
        return {
            "aum": state["margin_sum"] / per_visit,
            "el2n": state["el2n_sum"] / per_early,
            "forgetting": forgetting,
            "correctness": state["right_count"] / per_visit,
            "confidence": mean_p,
            "variability": np.sqrt(variance),
        }
