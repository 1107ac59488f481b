"""The score table: one row per example, one column per score, and what each score means.

Six scores of section 3 and appendix B of the CCS paper, each with its direction: hardness is the
score or its negative, so that everywhere else "larger is harder".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysys.errors import ConfigError
from raysys.training.ccs.hashing import multiset_digest

# +1: larger is harder; -1: smaller is harder.
DIRECTION: Mapping[str, int] = {
    "aum": -1,
    "el2n": 1,
    "forgetting": 1,
    "correctness": -1,
    "confidence": -1,
    "entropy": 1,
    "loss": 1,
    "grand": 1,
    "dual": 1,
}
WITHOUT_LABELS = ("entropy",)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class ScoreTable:
    """Scores of N examples.

    Args:
        ids: int64, unique, not negative, any order, gaps allowed; shape (N,).
        scores: name -> float64 of shape (N,), all finite.
        labels: int64 class indices of shape (N,), or None.
        features: float32 of shape (N, D) for the methods that use geometry, or None.

    Raises:
        ConfigError: lengths differ, ids repeat or are negative, or a score is not finite.
    """

    ids: NDArray[np.int64]
    scores: Mapping[str, NDArray[np.float64]]
    labels: NDArray[np.int64] | None = None
    features: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        if len(self.ids) == 0:
            raise ConfigError("ids", 0, "at least one example")
        check_ids(self.ids)
        for name, values in self.scores.items():
            _check_length(f"scores.{name}", values, len(self.ids))
            check_finite(f"scores.{name}", self.ids, values)
        if self.labels is not None:
            _check_length("labels", self.labels, len(self.ids))
        if self.features is not None:
            _check_length("features", self.features, len(self.ids))

    def __len__(self) -> int:
        return len(self.ids)

    def score(self, name: str) -> NDArray[np.float64]:
        """Return a score's column.

        Raises:
            ConfigError: the table lacks it; names the scores that it has.
        """
        if name not in self.scores:
            remedy = "Scores that need no labels: " + ", ".join(WITHOUT_LABELS)
            raise ConfigError("score", name, f"one of {sorted(self.scores)}", remedy)
        return self.scores[name]

    def hardness(self, name: str) -> NDArray[np.float64]:
        """Return a score turned so that larger is harder (AUM becomes -AUM)."""
        return DIRECTION.get(name, 1) * self.score(name)

    def need_labels(self, why: str) -> NDArray[np.int64]:
        if self.labels is None:
            raise ConfigError("labels", None, f"class labels, needed by {why}")
        return self.labels

    def need_features(self, why: str) -> NDArray[np.float32]:
        if self.features is None:
            raise ConfigError("features", None, f"an (N, D) feature array, needed by {why}")
        return self.features

    def rows_of(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the row position of each id.

        Raises:
            ConfigError: an id is not in the table.
        """
        order = np.argsort(self.ids, kind="stable")
        position = np.minimum(np.searchsorted(self.ids, ids, sorter=order), len(order) - 1)
        rows = order[position]
        unknown = self.ids[rows] != ids
        if unknown.any():
            raise ConfigError("ids", ids[unknown][:5].tolist(), "ids of this table")
        found: NDArray[np.int64] = rows.astype(np.int64)
        return found

    def take(self, rows: NDArray[Any]) -> ScoreTable:
        """Return the table of some rows."""
        return ScoreTable(
            self.ids[rows],
            {name: values[rows] for name, values in self.scores.items()},
            None if self.labels is None else self.labels[rows],
            None if self.features is None else self.features[rows],
        )

    def fingerprint(self) -> str:
        """Fingerprint of ids and labels, whatever their order."""
        return fingerprint(self.ids, self.labels)


def fingerprint(ids: NDArray[np.int64], labels: NDArray[np.int64] | None) -> str:
    """Fingerprint of a data set, ``rows-digest``: independent of row order and partitions."""
    return format_fingerprint(len(ids), multiset_digest(ids, labels))


def format_fingerprint(rows: int, digest: int) -> str:
    return f"{rows}-{digest % 2**64:016x}"


def check_ids(ids: NDArray[np.int64], *, unique: bool = True) -> None:
    """Check that ids are integers, not negative and, if asked, unique.

    Raises:
        ConfigError: names the first offending ids.
    """
    if ids.dtype.kind not in "iu":
        remedy = "Map text ids with raysys.training.ccs.stable_ids"
        raise ConfigError("ids", str(ids.dtype), "integer ids", remedy)
    if len(ids) and int(ids.min()) < 0:
        raise ConfigError("ids", ids[ids < 0][:5].tolist(), "ids that are not negative")
    if unique:
        repeated = duplicates(ids)
        if len(repeated):
            remedy = "Each example needs an id of its own"
            raise ConfigError("ids", repeated[:5].tolist(), "unique ids", remedy)


def duplicates(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the ids that occur more than once, sorted."""
    ordered = np.sort(ids)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    return np.unique(repeated)


def check_finite(field: str, ids: NDArray[np.int64], values: NDArray[np.float64]) -> None:
    """Reject NaN and infinite scores.

    Raises:
        ConfigError: lists the first five ids.
    """
    bad = ~np.isfinite(values)
    if bad.any():
        remedy = "Training diverged or the file is damaged: score these examples again"
        raise ConfigError(field, f"ids {ids[bad][:5].tolist()}", "finite scores", remedy)


def check_labels(labels: Any, classes: int) -> NDArray[np.int64]:
    """Return class indices as int64, rejecting everything that is not one class per example.

    Raises:
        ConfigError: float, one-hot, multi-label or out-of-range labels.
    """
    array = np.asarray(labels)
    if array.ndim != 1:
        remedy = "One class index per example; for multi-label data use the loss score"
        raise ConfigError("labels", array.shape, "a vector of class indices", remedy)
    if array.dtype.kind not in "iu":
        remedy = "Convert class labels to integers; for regression use the loss score"
        raise ConfigError("labels", str(array.dtype), "integer class indices", remedy)
    if len(array) and not 0 <= int(array.min()) <= int(array.max()) < classes:
        wanted = f"class indices in [0, {classes})"
        raise ConfigError("labels", [int(array.min()), int(array.max())], wanted)
    return array.astype(np.int64)


def stable_ids(names: list[str]) -> tuple[NDArray[np.int64], dict[str, int]]:
    """Map text ids to integers by their sorted order; returns the ids and the dictionary.

    Raises:
        ConfigError: a name occurs twice.
    """
    mapping = {name: index for index, name in enumerate(sorted(set(names)))}
    if len(mapping) != len(names):
        seen: set[str] = set()
        twice = [name for name in names if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
        raise ConfigError("ids", twice[:5], "unique ids")
    return np.asarray([mapping[name] for name in names], np.int64), mapping


def _check_length(field: str, values: NDArray[Any], rows: int) -> None:
    if len(values) != rows:
        raise ConfigError(field, len(values), f"{rows} rows, one per id")
