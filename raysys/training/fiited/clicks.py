"""Click logs as streams: Parquet, CSV with a header, and Criteo's TSV, in order and in batches.

Integers are ids as they are; text is hashed; a missing category is an id of its own. Dense features
become sign(x) log(1 + |x|), a missing one is 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from raysys.errors import ConfigError, DataError, StorageError
from raysys.training.fiited.bag import hash_strings

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
Format = Literal["auto", "parquet", "csv", "criteo"]

MISSING = -1  # as bits: the last of the 64-bit ids
CRITEO_DENSE = tuple(f"I{i}" for i in range(1, 14))
CRITEO_CATEGORICAL = tuple(f"C{i}" for i in range(1, 27))
_SUFFIXES = {".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".tsv": "criteo"}


@dataclass(frozen=True, slots=True)
class Schema:
    """Which columns are what."""

    label: str
    categorical: tuple[str, ...]
    dense: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Clicks:
    """Rows of a log: ids [B, F], dense features [B, X], labels [B] of 0 and 1."""

    ids: I64
    dense: F32
    labels: F32

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, low: int, high: int) -> Clicks:
        """A part."""
        return Clicks(self.ids[low:high], self.dense[low:high], self.labels[low:high])


class ClickLog:
    """One or several files of one format, read in the given order.

    Args:
        paths: files; a folder stands for its files of the format, sorted.
        label: label column. categorical, dense: columns; empty takes all others by type: integers
            and text are categories, floats are dense.
        text: columns to read as text although the first rows look like integers (CSV).

    Raises:
        StorageError: a file is missing.
        ConfigError: unknown format, or columns that overlap.
        DataError: a column is missing or has a type that cannot be used.
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        label: str = "label",
        categorical: Sequence[str] = (),
        dense: Sequence[str] = (),
        text: Sequence[str] = (),
        format_: Format = "auto",
    ) -> None:
        self.format, self.paths = _find_files(paths, format_)
        self.text = tuple(text)
        self.schema = self._resolve(label, tuple(categorical), tuple(dense))

    def batches(self, size: int, *, skip: int = 0) -> Iterator[Clicks]:
        """All rows in batches of ``size`` (the last may be smaller), after ``skip`` rows.

        Raises:
            DataError: damaged file, label other than 0 and 1, dense value that is not finite.
        """
        kept: list[Clicks] = []
        count = 0
        for path in self.paths:
            position = 0
            for table in self._tables(path):
                take = table.slice(min(skip, len(table)))
                skip -= len(table) - len(take)
                position += len(table)
                if not len(take):
                    continue
                kept.append(self._convert(path, take, position - len(take)))
                count += len(take)
                if count >= size:
                    joined = _join(kept)
                    whole = count - count % size
                    for low in range(0, whole, size):
                        yield joined.rows(low, low + size)
                    kept, count = [joined.rows(whole, count)], count - whole
        if count:
            yield _join(kept)

    def count_rows(self) -> int:
        """Rows of all files: exact for Parquet, lines for text."""
        total = 0
        for path in self.paths:
            if self.format == "parquet":
                total += int(pq.read_metadata(path).num_rows)
                continue
            with path.open("rb") as file:
                lines = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
            total += max(0, lines - (self.format == "csv"))
        return total

    def _resolve(self, label: str, categorical: tuple[str, ...], dense: tuple[str, ...]) -> Schema:
        if self.format == "criteo":
            return Schema("label", categorical or CRITEO_CATEGORICAL, dense or CRITEO_DENSE)
        path = self.paths[0]
        found = self._arrow_schema(path)
        for name in (label, *categorical, *dense):
            if name not in found.names:
                reason = f"no column {name!r}; there are {', '.join(found.names)}"
                raise DataError(str(path), reason, "Set label, categorical and dense")
        if not categorical and not dense:
            others = [f for f in found if f.name != label]
            dense = tuple(f.name for f in others if pa.types.is_floating(f.type))
            categorical = tuple(f.name for f in others if f.name not in dense)
        if not categorical:
            raise DataError(str(path), "no categorical column", "Set categorical")
        if len({label, *categorical, *dense}) < 1 + len(categorical) + len(dense):
            raise ConfigError("categorical", categorical, "columns used once, and not the label")
        return Schema(label, categorical, dense)

    def _arrow_schema(self, path: Path) -> pa.Schema:
        try:
            if self.format == "parquet":
                return pq.read_schema(path)
            with self._open_csv(path) as reader:
                return reader.schema
        except (pa.ArrowException, OSError) as error:
            raise DataError(str(path), str(error), "Give an intact file") from error

    def _tables(self, path: Path) -> Iterator[pa.Table]:
        names = [self.schema.label, *self.schema.categorical, *self.schema.dense]
        try:
            if self.format == "parquet":
                with pq.ParquetFile(path) as file:
                    for batch in file.iter_batches(batch_size=65536, columns=names):
                        yield pa.Table.from_batches([batch])
                return
            with self._open_csv(path) as reader:
                for batch in reader:
                    yield pa.Table.from_batches([batch]).select(names)
        except (pa.ArrowException, OSError, KeyError) as error:
            remedy = "Give an intact file; name text columns that look like numbers in `text`"
            raise DataError(str(path), str(error), remedy) from error

    def _open_csv(self, path: Path) -> pacsv.CSVStreamingReader:
        types: dict[str, pa.DataType] = dict.fromkeys(self.text, pa.string())
        if self.format == "csv":
            convert = pacsv.ConvertOptions(column_types=types, strings_can_be_null=True)
            return pacsv.open_csv(path, convert_options=convert)
        types = {"label": pa.int64()} | dict.fromkeys(CRITEO_DENSE, pa.float32())
        types |= dict.fromkeys(CRITEO_CATEGORICAL, pa.string())
        return pacsv.open_csv(
            path,
            read_options=pacsv.ReadOptions(column_names=list(types)),
            parse_options=pacsv.ParseOptions(delimiter="\t"),
            convert_options=pacsv.ConvertOptions(column_types=types, strings_can_be_null=True),
        )

    def _convert(self, path: Path, table: pa.Table, first: int) -> Clicks:
        schema = self.schema
        labels = _numbers(path, schema.label, table.column(schema.label))
        wrong = (labels != 0) & (labels != 1)
        if wrong.any():
            row = int(np.argmax(wrong))
            reason = f"{schema.label} is {labels[row]} in row {first + row}"
            raise DataError(str(path), reason, "Labels must be 0 or 1")
        ids = [_ids(path, name, table.column(name)) for name in schema.categorical]
        dense = [_dense(path, name, table.column(name), first) for name in schema.dense]
        return Clicks(
            np.stack(ids, 1),
            np.stack(dense, 1) if dense else np.zeros((len(table), 0), np.float32),
            labels.astype(np.float32),
        )


def encode_columns(schema: Schema, columns: dict[str, list[object]], rows: int) -> Clicks:
    """Columns of plain values as clicks without labels.

    Raises:
        DataError: a column of the wrong type; the message names it.
    """
    where = Path("request")

    def column(name: str) -> pa.ChunkedArray:
        try:
            return pa.chunked_array([pa.array(columns[name])])
        except (pa.ArrowException, OverflowError) as error:
            raise DataError(str(where), f"{name}: {error}", "Send one type per column") from error

    ids = [_ids(where, name, column(name)) for name in schema.categorical]
    dense = [_dense(where, name, column(name), 0) for name in schema.dense]
    empty = np.zeros((rows, 0), np.float32)
    return Clicks(
        np.stack(ids, 1), np.stack(dense, 1) if dense else empty, np.zeros(rows, np.float32)
    )


def _find_files(paths: Sequence[str], format_: Format) -> tuple[str, list[Path]]:
    files: list[Path] = []
    for given in paths:
        path = Path(given)
        if path.is_dir():
            suffixes = [s for s, f in _SUFFIXES.items() if format_ in ("auto", f)]
            files += sorted(p for p in path.iterdir() if p.suffix in suffixes)
        elif path.is_file():
            files.append(path)
        else:
            raise StorageError(given, "no such file or folder", "Check data")
    if not files:
        raise StorageError(", ".join(paths), "no data files", "Give Parquet, CSV or TSV files")
    kinds = {_SUFFIXES.get(p.suffix, "") if format_ == "auto" else format_ for p in files}
    if len(kinds) > 1 or "" in kinds:
        raise ConfigError("format", sorted(p.name for p in files)[:3], "files of one known format")
    return kinds.pop(), files


def _ids(path: Path, name: str, column: pa.ChunkedArray) -> I64:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_null(column.type):
        return np.full(len(column), MISSING, np.int64)
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int64())
    if pa.types.is_uint64(column.type):
        filled = pc.fill_null(column, 2**64 - 1)
        return np.asarray(filled.to_numpy().view(np.int64))
    if pa.types.is_integer(column.type):
        return np.asarray(pc.fill_null(column.cast(pa.int64()), MISSING).to_numpy())
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        encoded = column.combine_chunks().dictionary_encode()
        hashed = np.append(hash_strings(encoded.dictionary.to_pylist()), MISSING)
        index = pc.fill_null(encoded.indices, len(hashed) - 1).to_numpy(zero_copy_only=False)
        return np.asarray(hashed[index], np.int64)
    reason = f"{name} is of type {column.type}"
    raise DataError(str(path), reason, "Categories are integers or text; list it in dense instead")


def _numbers(path: Path, name: str, column: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    try:
        filled = pc.fill_null(column.cast(pa.float64()), float("nan"))
    except pa.ArrowException as error:
        raise DataError(str(path), f"{name}: {error}", "Give numbers") from error
    return np.asarray(filled.to_numpy(), np.float64)


def _dense(path: Path, name: str, column: pa.ChunkedArray, first: int) -> F32:
    missing = np.asarray(column.is_null().to_numpy())
    values = np.where(missing, 0.0, _numbers(path, name, column))
    if not np.isfinite(values).all():
        row = first + int(np.argmin(np.isfinite(values)))
        raise DataError(str(path), f"{name} is not finite in row {row}", "Clean the column")
    return np.asarray(np.sign(values) * np.log1p(np.abs(values)), np.float32)


def _join(parts: list[Clicks]) -> Clicks:
    if len(parts) == 1:
        return parts[0]
    return Clicks(
        np.concatenate([p.ids for p in parts]),
        np.concatenate([p.dense for p in parts]),
        np.concatenate([p.labels for p in parts]),
    )
