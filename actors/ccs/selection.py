"""Selection as Ray tasks over Parquet row groups or the blocks of a Ray data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysys.errors import ConfigError, DataError, StorageError
from raysys.training.ccs.blocks import Block
from raysys.training.ccs.coreset import Coreset
from raysys.training.ccs.edges import MapBlocks
from raysys.training.ccs.selection import Selection, SelectionConfig, run_selection
from raysys.training.ccs.store import parse_meta, split
from raysys.training.ccs.table import DIRECTION

AnswerT = TypeVar("AnswerT")
BATCH_ROWS = 1_000_000  # rows that a task holds at a time
IN_FLIGHT = 8


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Which columns a selection reads; hardness is ``cutoff`` turned so that larger is harder."""

    score: str = "aum"
    cutoff: str = "aum"
    id: str = "id"
    label: str | None = None

    def names(self) -> list[str]:
        """Columns to read, each once."""
        wanted = [self.id, self.score, self.cutoff, *([self.label] if self.label else [])]
        return list(dict.fromkeys(wanted))

    def block(self, table: pa.Table, path: str) -> Block:
        """Turn an Arrow table into a block.

        Raises:
            DataError: a column is absent.
            ConfigError: a column is null somewhere, or ids are no integers.
        """
        missing = [name for name in self.names() if name not in table.column_names]
        if missing:
            raise DataError(path, f"lacks {missing}, has {table.column_names}", "Score the data")
        holes = [name for name in self.names() if table[name].null_count]
        if holes:
            raise ConfigError(f"{path}: {holes}", "null", "a value in every row")
        if not pa.types.is_integer(table[self.id].type):
            remedy = "Map text ids with raysys.training.ccs.stable_ids"
            raise ConfigError(self.id, str(table[self.id].type), "integer ids", remedy)
        score = table[self.score].to_numpy().astype(np.float64)
        cutoff = table[self.cutoff].to_numpy().astype(np.float64)
        labels = table[self.label].to_numpy().astype(np.int64) if self.label else None
        ids = table[self.id].to_numpy().astype(np.int64)
        return Block(ids, score, DIRECTION.get(self.cutoff, 1) * cutoff, labels)


Piece = tuple[str, tuple[int, ...]]  # a Parquet file and some of its row groups


def pieces_of(paths: Sequence[str], partitions: int) -> list[list[Piece]]:
    """Share the row groups of some Parquet files over at most ``partitions`` tasks.

    Raises:
        StorageError: no files, or one cannot be read.
        DataError: a file is truncated or of another schema version.
    """
    if not paths:
        raise StorageError("scores", "no files were given", "Give at least one Parquet file")
    if partitions < 1:
        raise ConfigError("partitions", partitions, "a number of tasks >= 1")
    pieces: list[Piece] = []
    for path in paths:
        meta = _open(path).metadata
        if b"raysys.ccs" in (meta.metadata or {}):
            parse_meta(path, meta.metadata)
        held, group_rows = [], 0
        for group in range(meta.num_row_groups):
            held.append(group)
            group_rows += meta.row_group(group).num_rows
            if group_rows >= BATCH_ROWS // 8:
                pieces.append((path, tuple(held)))
                held, group_rows = [], 0
        if held:
            pieces.append((path, tuple(held)))
    cuts = np.array_split(np.arange(len(pieces)), min(partitions, max(1, len(pieces))))
    return [[pieces[index] for index in cut] for cut in cuts]


def count_rows(paths: Sequence[str]) -> int:
    """Rows of some Parquet files, from their footers.

    Raises:
        StorageError, DataError: a file cannot be read.
    """
    return sum(_open(path).metadata.num_rows for path in paths)


def run_pass(
    function: Callable[[Block], AnswerT], pieces: list[Piece], columns: Columns
) -> list[AnswerT]:
    """A task: apply a pass to the row groups, at most about ``BATCH_ROWS`` rows at a time."""
    answers = []
    for path, groups in pieces:
        file = _open(path)
        names = [name for name in columns.names() if name in file.schema_arrow.names]
        try:
            table = file.read_row_groups(list(groups), columns=names, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise DataError(path, f"damaged ({error})", "Write the file again") from None
        answers.append(function(columns.block(table, path)))
    return answers


def run_block_pass(
    function: Callable[[Block], AnswerT], table: pa.Table, columns: Columns
) -> list[AnswerT]:
    """A task: apply a pass to one Arrow block of a Ray data set."""
    return [function(columns.block(table, "data set"))]


def select_parquet(
    paths: Sequence[str],
    m: int,
    config: SelectionConfig,
    columns: Columns | None = None,
    *,
    partitions: int = 8,
) -> Selection:
    """Select over Parquet files with Ray tasks; the result does not depend on ``partitions``.

    Raises:
        ConfigError, InfeasibleError: as :func:`run_selection`.
        StorageError, DataError: a file cannot be read.
    """
    chosen = columns or Columns()
    shares = pieces_of(paths, partitions)
    return run_selection(_task_map(run_pass, [(share, chosen) for share in shares]), m, config)


def select_dataset(
    dataset: Any, m: int, config: SelectionConfig, columns: Columns | None = None
) -> Selection:
    """Select over a Ray data set, one task per block; only the named columns are moved."""
    chosen = columns or Columns()
    blocks = dataset.select_columns(chosen.names()).to_arrow_refs()
    if not blocks:
        raise ConfigError("rows", 0, "at least one example")
    return run_selection(_task_map(run_block_pass, [(b, chosen) for b in blocks]), m, config)


def coreset_dataset(dataset: Any, coreset: Coreset, id_column: str = "id") -> Any:
    """The coreset's rows of a Ray data set, lazily (a semi-join by id).

    Blocks come as Ray Data finishes them; for the data set's own order set
    ``dataset.context.execution_options.preserve_order`` before, as everywhere in Ray Data.
    """
    kept = pa.array(coreset.ids)

    def keep(batch: pa.Table) -> pa.Table:
        import pyarrow.compute as pc

        return batch.filter(pc.is_in(batch[id_column], value_set=kept))

    return dataset.map_batches(keep, batch_format="pyarrow")


def _task_map(task: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> MapBlocks:
    """Map passes over shares with a bounded number of tasks in flight."""
    import ray

    remote = ray.remote(num_cpus=1)(task)

    def map_blocks(function: Callable[[Block], AnswerT], /) -> Iterable[AnswerT]:
        function_ref = ray.put(function)
        waiting = list(arguments)
        running: list[Any] = []
        while waiting or running:
            while waiting and len(running) < IN_FLIGHT:
                running.append(remote.remote(function_ref, *waiting.pop(0)))
            done, running = ray.wait(running, num_returns=1)
            yield from ray.get(done[0])

    return map_blocks


def _open(path: str) -> Any:
    storage, name = split(path)
    if not storage.exists(name):
        raise StorageError(path, "does not exist", "Check the path")
    try:
        return pq.ParquetFile(storage.filesystem.open_input_file(storage.path(name)))
    except (pa.ArrowException, OSError) as error:
        raise DataError(path, f"not a whole Parquet file ({error})", "Write it again") from None
