"""MovieLens "latest small" as clicks: fields user, movie, first genre, year; click = rating >= 4.

The data set is read from the folder of optional data; it is never part of the package.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from raysys.errors import CapabilityError, DataError
from raysys.machine import data_dir
from raysys.training.fiited.stream import ClickBatch

_YEAR = re.compile(r"\((\d{4})\)\s*$")


@dataclass(frozen=True, slots=True)
class Ratings:
    """Ids [n, 4] numbered from 0 per field, labels [n] and Unix times [n]."""

    ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.float32]
    times: npt.NDArray[np.int64]


def load(folder: Path | None = None) -> Ratings:
    """Read ratings.csv and movies.csv.

    Raises:
        CapabilityError: the data set is not on this machine.
        DataError: a file lacks its columns.
    """
    root = folder or _folder()
    movies = {}
    for row in _rows(root / "movies.csv", ("movieId", "title", "genres")):
        year = _YEAR.search(row[1])
        movies[row[0]] = (row[2].split("|")[0], year.group(1) if year else "")
    columns: list[list[str]] = [[], [], [], []]
    labels, times = [], []
    for row in _rows(root / "ratings.csv", ("userId", "movieId", "rating", "timestamp")):
        genre, year_text = movies.get(row[1], ("", ""))
        for column, value in zip(columns, (row[0], row[1], genre, year_text)):
            column.append(value)
        labels.append(float(row[2]) >= 4)
        times.append(int(row[3]))
    ids = [np.unique(column, return_inverse=True)[1] for column in columns]
    stacked = np.stack(ids, 1).astype(np.int64)
    return Ratings(stacked, np.array(labels, np.float32), np.array(times, np.int64))


def fields(data: Ratings) -> list[int]:
    """Distinct ids per field."""
    return [int(n) + 1 for n in data.ids.max(axis=0)]


def split_stream(data: Ratings, seed: int, *, passes: int, batch: int) -> list[ClickBatch]:
    """A random 90% of the ratings, ``passes`` times, then the held-out tenth."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(data.labels))
    held = len(order) // 10
    pieces = [rng.permutation(order[held:]) for _ in range(passes)] + [order[:held]]
    batches = []
    for piece in pieces:
        for low in range(0, len(piece), batch):
            chosen = piece[low : low + batch]
            labels = data.labels[chosen]
            batches.append(ClickBatch(data.ids[chosen], labels, labels))
    return batches


def _folder() -> Path:
    root = data_dir()
    path = root / "ml-latest-small" if root else None
    if path is None or not path.is_dir():
        raise CapabilityError(
            "MovieLens latest small",
            "no folder ml-latest-small with the optional data",
            "Unpack ml-latest-small.zip of grouplens.org and set RAYSYS_DATA to its parent",
        )
    return path


def _rows(path: Path, columns: tuple[str, ...]) -> list[list[str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
    except OSError as error:
        raise DataError(str(path), error.strerror or str(error), "Restore the file") from error
    if not rows or tuple(rows[0]) != columns:
        raise DataError(str(path), f"expected the columns {columns}", "Restore the file")
    return rows[1:]
