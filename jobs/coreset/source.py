"""Where labelled data comes from: a built-in set, an ``.npz`` file, or Parquet with vectors."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysys import machine
from raysys.config import check_range
from raysys.errors import ConfigError, DataError, StorageError
from raysys.training.ccs.table import check_ids, check_labels
from raysys.training.datasets import LabelledArrays, Split, digits, fashion_mnist, mnist1d

BUILT_IN = ("digits", "mnist1d", "fashion-mnist")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """A data set.

    Args:
        name: ``digits``, ``mnist1d``, ``fashion-mnist``; or a path: ``.npz`` with arrays ``x``,
            ``y`` and optionally ``ids``, ``x_test``, ``y_test``; ``.parquet`` with ``id``,
            ``label`` and ``features`` (a list of floats).
        train_rows, test_rows: size of a built-in set; 0 takes its default.
        test_share: share that is split off as a test set where a file has none.
        seed: of that split, and of the generated set.
    """

    name: str = "digits"
    train_rows: int = 0
    test_rows: int = 0
    test_share: float = 0.2
    seed: int = 42

    def __post_init__(self) -> None:
        check_range(self, "train_rows", 0)
        check_range(self, "test_rows", 0)
        check_range(self, "test_share", 0, 1, low_open=True, high_open=True)

    def load(self) -> Split:
        """Load it.

        Raises:
            ConfigError: no such set, or bad labels or ids.
            CapabilityError: the set's files are not on this machine.
            StorageError, DataError: a file is missing or damaged.
        """
        if self.name == "digits":
            return digits(self.test_rows or 397, self.seed)
        if self.name == "mnist1d":
            return mnist1d(self.train_rows or 20_000, self.test_rows or 4000, self.seed)
        if self.name == "fashion-mnist":
            rows, test = self.train_rows or 60_000, self.test_rows or 10_000
            return fashion_mnist(machine.data_dir(), rows, test, pool=2)
        suffix = Path(self.name).suffix
        if suffix not in (".npz", ".parquet"):
            wanted = f"one of {', '.join(BUILT_IN)}, or a path to .npz or .parquet"
            raise ConfigError("data.name", self.name, wanted)
        if not Path(self.name).is_file():
            raise StorageError(self.name, "does not exist", "Check the path")
        arrays = _read_npz(self.name) if suffix == ".npz" else _read_parquet(self.name)
        return self._split(arrays)

    def _split(self, arrays: dict[str, Any]) -> Split:
        for name in ("x", "y"):
            if name not in arrays:
                raise DataError(self.name, f"has no array {name!r}", "See docs/ccs.md")
        raw = np.asarray(arrays["y"])
        count = int(raw.max()) + 1 if raw.ndim == 1 and raw.dtype.kind in "iu" and len(raw) else 2
        whole = _labelled(arrays["x"], raw, arrays.get("ids"), count)
        if "x_test" in arrays and "y_test" in arrays:
            return Split(
                self.name, whole, _labelled(arrays["x_test"], arrays["y_test"], None, count)
            )
        order = np.random.default_rng(self.seed).permutation(len(whole))
        held = max(1, round(self.test_share * len(whole)))
        train, test = np.sort(order[held:]), np.sort(order[:held])
        return Split(self.name, whole.take(train), whole.take(test))


def _labelled(x: Any, y: Any, ids: Any, classes: int) -> LabelledArrays:
    inputs = np.asarray(x, np.float32)
    labels = check_labels(y, classes)
    if len(inputs) != len(labels) or len(labels) < 2:
        raise ConfigError("data", (len(inputs), len(labels)), "two or more rows, each with a label")
    if not np.isfinite(inputs).all():
        raise ConfigError("data.x", "NaN or infinite", "finite inputs")
    known = np.arange(len(labels)) if ids is None else np.asarray(ids)
    check_ids(known)
    return LabelledArrays(inputs, labels, known.astype(np.int64), classes)


def _read_npz(path: str) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError) as error:
        raise DataError(
            path, f"not a readable .npz ({error})", "Write it with numpy.savez"
        ) from None


def _read_parquet(path: str) -> dict[str, Any]:
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(path, f"not a whole Parquet file ({error})", "Write it again") from None
    missing = [name for name in ("label", "features") if name not in table.column_names]
    if missing:
        raise DataError(path, f"lacks {missing}", "Columns: id, label, features")
    rows = table["features"].to_pylist()
    if len({len(row) for row in rows}) != 1:
        raise DataError(path, "feature lists differ in length", "Give vectors of one width")
    arrays: dict[str, Any] = {"x": rows, "y": table["label"].to_numpy()}
    if "id" in table.column_names:
        arrays["ids"] = table["id"].to_numpy()
    return arrays
