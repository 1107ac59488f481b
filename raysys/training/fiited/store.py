"""The store as the rest of the library sees it: checked inputs, cadence, statistics.

A store is a virtually-hashed, physically-indexed table (paper, section on VHPI): an id becomes a
64-bit virtual row, a directory holds only the rows that own memory, and a row with m alive chunks
owns one slot of class m. Every public method checks its input before any state changes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from raysys.errors import CapabilityError, ConfigError
from raysys.ops import fiited_abi as abi
from raysys.training.fiited.batch_checks import check_ids, check_offsets, check_weights
from raysys.training.fiited.config import FiitedConfig, TableSpec, budget_slots, check_tables
from raysys.training.fiited.native import F32, I64, Batch, NativeEngine

Engine = Any  # NativeEngine, or ReferenceEngine with the same methods


class FiitedStore:
    """Rows of several tables under one budget.

    Args:
        config: see :class:`FiitedConfig`.
        tables: the tables; their widths are multiples of ``config.chunk``.
        engine: "auto" takes compiled code where a compiler is at hand and the reference
            implementation otherwise; "native" and "reference" insist.
        isa: instruction set of the compiled code; None takes the best.
        dense: keep every row ``0 .. rows-1`` at full width without hashing (the full-width
            baseline, and the kernel that the indirection is compared with).

    Raises:
        ConfigError: tables that do not fit the configuration.
        CapabilityError: ``engine="native"`` without a compiler.
    """

    def __init__(
        self,
        config: FiitedConfig,
        tables: tuple[TableSpec, ...],
        *,
        engine: str = "auto",
        isa: str | None = None,
        dense: bool = False,
    ) -> None:
        check_tables(config, tables)
        self.config = config
        self.tables = tables
        self.slots = budget_slots(config, tables)
        self.dense = dense
        self.engine = _make_engine(config, tables, self.slots, engine, isa, dense)
        limit = self.engine.max_slots()
        if self.slots > limit:
            raise ConfigError("budget", self.slots, f"at most {limit} chunks (reference width)")
        self.steps = 0
        self.next_round = round_gap(0, config.interval)
        widths = [table.dim for table in tables]
        self.columns: I64 = np.cumsum([0, *widths[:-1]]).astype(np.int64)
        self.width = sum(widths)
        self._rows = min(table.rows for table in tables)
        self._even: tuple[int, I64] = (0, np.zeros(len(tables) + 1, np.int64))

    def __reduce__(self) -> NoReturn:
        raise ConfigError(
            "store", "pickling", "no pickling of a live store", "Use export_dense or a checkpoint"
        )

    def lookup(
        self,
        values: Sequence[npt.ArrayLike] | npt.NDArray[Any],
        offsets: list[npt.ArrayLike] | None = None,
        *,
        mean: bool = False,
        weights: list[npt.ArrayLike] | None = None,
        train: bool = False,
        mask_below: float = 0.0,
        out: F32 | None = None,
    ) -> tuple[F32, Batch]:
        """Pooled vectors of a batch.

        Args:
            values: ids per table, integers; without offsets all of the same length B. Or one
                array of all ids, B of the first table, then B of the next: not copied if int64.
            offsets: per table B + 1 (or B, the last bag then ends with the values) positions.
            mean: divide by the bag's size; an empty bag gives zeros.
            weights: per value of every table, finite.
            train: whether an update follows; may create rows when ``admit_after`` is 0.
            mask_below: hide chunks of a smaller stored utility (used by the quality guard).
            out: [B, sum of D_t] fp32 to write into.

        Returns:
            out [B, sum of D_t] and the batch for :meth:`update`.

        Raises:
            ConfigError: malformed ids, offsets or weights; nothing has changed.
        """
        joined, starts, sizes = self._joined(values)
        absolute, bags = check_offsets(sizes, offsets, starts)
        per_value = check_weights(sizes, weights)
        if out is None:
            out = aligned_empty(bags, self.width)
        elif out.shape != (bags, self.width) or out.dtype != np.float32:
            raise ConfigError("out", (out.shape, str(out.dtype)), f"fp32 {(bags, self.width)}")
        scale = np.float32(mask_below * self.engine.counters()["scale"]) if mask_below else 0.0
        batch = self.engine.lookup(
            joined, starts, absolute, bags, mean, per_value, train, scale, out, self.columns
        )
        return out, batch

    def update(
        self, batch: Batch, grad: F32, *, lr: float | None = None, loss_scale: float = 1.0
    ) -> int:
        """Apply the output gradient [B, sum of D_t] of a training lookup; one use per batch.

        Args:
            loss_scale: factor by which gradients must be multiplied to stand for a loss summed
                over samples (the batch size for a mean loss); it only affects utilities.

        Returns:
            Rows rejected because their gradient was not finite.
        """
        if grad.ndim != 2 or grad.shape[1] != self.width or grad.dtype != np.float32:
            got = (grad.shape, str(grad.dtype))
            raise ConfigError("gradient", got, f"fp32 [batch, {self.width}]")
        grad = np.ascontiguousarray(grad)
        strict = self.config.on_nonfinite == "raise"
        rate = self.config.lr if lr is None else lr
        return int(self.engine.update(batch, grad, rate, loss_scale, strict))

    def end_step(self) -> None:
        """Count a step and adjust as the cadence says; call once after the step's updates."""
        continuous = self.config.cadence == "continuous" and not self.dense
        limit = 1_000_000 if continuous and self.config.compact else 0
        self.engine.end_step(self.config.interval if continuous else 0, limit)
        self.steps += 1
        if self.config.cadence == "interval" and self.steps >= self.next_round and not self.dense:
            self.adjust()
            self.next_round = self.steps + round_gap(self.steps, self.config.interval)

    def adjust(self) -> None:
        """One full adjustment round, now."""
        self.engine.round()
        if self.config.compact:
            self.engine.compact(1 << 40)

    def set_budget(self, slots: int) -> None:
        """Change the budget; a smaller one evicts the least useful chunks and frees pages.

        Raises:
            InfeasibleError: pinned rows need more than that.
        """
        if slots < len(self.tables):
            raise ConfigError("budget_slots", slots, f"at least {len(self.tables)}")
        self.engine.set_budget(slots, 0)
        self.slots = slots

    def pin(self, table: str, ids: npt.ArrayLike, *, pin: bool = True) -> None:
        """Rows that may never be evicted; absent rows get their first chunk now.

        Raises:
            InfeasibleError: the budget is smaller than the pinned rows, or the pool is full.
        """
        index = self.table_index(table)
        self.engine.pin(index, np.unique(self.check_ids(index, ids)), pin)

    def dims(self, table: str, ids: npt.ArrayLike) -> I64:
        """Alive width of every id in floats; 0 for ids without memory."""
        alive, _, _ = self._inspect(table, ids)
        bits = np.maximum(alive, 0).astype(np.uint32)
        return np.asarray(np.bitwise_count(bits), np.int64) * self.config.chunk

    def utility(self, table: str, ids: npt.ArrayLike) -> F32:
        """Utilities [n, k] in today's scale; zeros for ids without memory."""
        return self._inspect(table, ids)[1]

    def explain(self, table: str, id_: int) -> dict[str, Any]:
        """Why an id has the length that it has; JSON-ready."""
        alive, utilities, touched = self._inspect(table, [id_])
        spec = self.tables[self.table_index(table)]
        counters = self.engine.counters()
        threshold = max(counters["cut_score"], 0.0) / max(counters["scale"], 1.0)
        return {
            "table": table,
            "id": id_,
            "resident": bool(alive[0] >= 0),
            "dim": int(np.bitwise_count(np.uint32(max(alive[0], 0)))) * self.config.chunk,
            "full_dim": spec.dim,
            "utilities": [float(u) for u in utilities[0][: spec.dim // self.config.chunk]],
            "threshold": threshold,
            "last_update_step": int(touched[0]),
        }

    def export_dense(self, table: str, ids: npt.ArrayLike) -> F32:
        """Vectors [n, D] of one table, zeros where a chunk or a row has no memory."""
        index = self.table_index(table)
        checked = self.check_ids(index, ids)
        values = [checked if i == index else np.empty(0, np.int64) for i in range(len(self.tables))]
        starts = np.cumsum([0, *[len(table) for table in values]]).astype(np.int64)
        out = np.zeros((len(checked), self.width), np.float32)
        args = (checked, starts, None, len(checked), False, None, False, 0.0, out, self.columns)
        self.engine.lookup(*args)
        column = int(self.columns[index])
        return out[:, column : column + self.tables[index].dim].copy()

    def resume_at(self, steps: int) -> None:
        """Continue the schedule of an interrupted run after ``steps`` steps."""
        self.steps = 0
        self.next_round = round_gap(0, self.config.interval)
        while self.next_round <= steps:
            self.next_round += round_gap(self.next_round, self.config.interval)
        self.steps = steps

    def freeze(self) -> None:
        """Refuse every later change; lookups in evaluation mode go on."""
        self.engine.freeze()

    def verify(self) -> None:
        """Check all invariants of storage and index (linear time).

        Raises:
            ConfigError: one is broken; this is a defect of the store, please report it.
        """
        broken = self.engine.verify()
        if broken:
            raise ConfigError("store", f"invariant {broken} broken", "a consistent store")

    def table_index(self, name: str) -> int:
        """Position of a table by name."""
        for index, table in enumerate(self.tables):
            if table.name == name:
                return index
        raise ConfigError("table", name, "one of " + ", ".join(t.name for t in self.tables))

    def check_ids(self, index: int, ids: npt.ArrayLike) -> I64:
        """Ids of one table as int64, or a ConfigError that names the table and the position."""
        return check_ids(self.config, self.tables[index], ids, dense=self.dense)

    def _joined(
        self, values: Sequence[npt.ArrayLike] | npt.NDArray[Any]
    ) -> tuple[I64, I64, list[int]]:
        """Checked ids of all tables in one array, where each table's begin, and how many it has."""
        if not isinstance(values, np.ndarray) or values.ndim != 1:
            return self._listed(list(values))
        count = len(self.tables)
        bags, rest = divmod(len(values), count)
        if rest:
            raise ConfigError("values", len(values), f"as many ids for each of {count} tables")
        if values.dtype != np.int64 or not values.flags.c_contiguous or not self._all_good(values):
            return self._listed(list(values.reshape(count, bags)))
        if bags != self._even[0]:
            self._even = (bags, np.arange(count + 1, dtype=np.int64) * bags)
        return values, self._even[1], [bags] * count

    def _listed(self, values: list[Any]) -> tuple[I64, I64, list[int]]:
        if len(values) != len(self.tables):
            raise ConfigError("values", len(values), f"ids for {len(self.tables)} tables")
        plain = all(type(v) is np.ndarray and v.ndim == 1 and v.dtype == np.int64 for v in values)
        joined: I64 | None = np.concatenate(values) if plain else None
        if joined is None or not self._all_good(joined):
            values = [self.check_ids(index, table) for index, table in enumerate(values)]
            joined = np.concatenate(values)
        sizes = [len(table) for table in values]
        return joined, np.array([0, *itertools.accumulate(sizes)], np.int64), sizes

    def _all_good(self, ids: I64) -> bool:
        """Whether int64 ids need no closer look."""
        if not ids.size or (self.config.id_space != "signed" and not self.dense):
            return True
        return bool(ids.min() >= 0) and (not self.dense or bool(ids.max() < self._rows))

    def _inspect(self, table: str, ids: npt.ArrayLike) -> tuple[npt.NDArray[np.int32], F32, I64]:
        index = self.table_index(table)
        alive, utilities, touched = self.engine.inspect(index, self.check_ids(index, ids))
        return alive, utilities, touched


def aligned_empty(rows: int, width: int) -> F32:
    """An uninitialised fp32 [rows, width] at a cache line: whole-line writes are much faster."""
    raw = np.empty(rows * width + 16, np.float32)
    start = -raw.ctypes.data % 64 // 4
    return raw[start : start + rows * width].reshape(rows, width)


def round_gap(step: int, interval: int) -> int:
    """Steps until the next round: denser at the start, then ``interval``.

    The schedule of the public row-level module: every 3 steps below 10, every 30 below 100,
    every 300 below 1000.
    """
    for limit, gap in ((10, 3), (100, 30), (1000, 300)):
        if step < limit:
            return min(gap, interval)
    return interval


def _make_engine(
    config: FiitedConfig,
    tables: tuple[TableSpec, ...],
    slots: int,
    engine: str,
    isa: str | None,
    dense: bool,
) -> Engine:
    from raysys.ops.fiited_reference import ReferenceEngine

    store, specs = store_config(config, tables, slots, dense)
    if engine == "reference":
        return ReferenceEngine(store, specs)
    try:
        return NativeEngine(store, specs, isa)
    except CapabilityError:
        if engine == "native":
            raise
        return ReferenceEngine(store, specs)


def store_config(
    config: FiitedConfig, tables: tuple[TableSpec, ...], slots: int, dense: bool = False
) -> tuple[abi.StoreConfig, list[abi.TableConfig]]:
    """The structures of the C interface for a configuration."""
    chunk_bytes = config.chunk * config.weight_bytes
    layout = "dense" if dense else "slabs" if config.shape == "prefix" else "chunked"
    store = abi.StoreConfig(
        tables=len(tables),
        chunk=config.chunk,
        max_chunks=max(table.dim for table in tables) // config.chunk,
        layout=abi.LAYOUTS[layout],
        optimizer=abi.OPTIMIZERS[config.optimizer],
        utility=abi.UTILITIES[config.utility],
        lifo=int(config.free_policy == "lifo"),
        admit_after=config.admit_after,
        min_alive=config.min_alive,
        init=abi.INITS[config.init],
        poison=int(config.poison),
        by_table=int(config.scope == "table"),
        half=int(config.weights == "bf16"),
        slots=slots,
        page_bytes=config.page_bytes or _page_bytes(slots * chunk_bytes, chunk_bytes * 15),
        sketch_cells=config.sketch_cells or min(slots, 2**28),
        budget_bytes=config.budget_bytes or 0,
        seed=config.seed,
        frequency_power=config.frequency_power,
        exploration=config.exploration,
        gamma=config.gamma,
        hysteresis=config.hysteresis,
        churn_cap=config.churn_cap,
        slack=config.slack,
        eps=config.eps,
        beta1=config.beta1,
        beta2=config.beta2,
        weight_decay=config.weight_decay,
        clip=config.clip,
        acc0=config.acc0,
        init_scale=config.init_scale,
    )
    return store, [_table_config(config, index, table) for index, table in enumerate(tables)]


def table_seed(config: FiitedConfig, index: int, table: TableSpec) -> int:
    """Seed of a table's hash."""
    own = table.seed if table.seed is not None else config.seed * 1009 + index + 1
    return (own * abi.GOLDEN) & 0xFFFFFFFFFFFFFFFF


def _table_config(config: FiitedConfig, index: int, table: TableSpec) -> abi.TableConfig:
    return abi.TableConfig(
        seed=table_seed(config, index, table),
        virtual_rows=table.virtual_rows,
        dense_rows=table.rows,
        chunks=table.dim // config.chunk,
        weight=table.weight,
    )


def _page_bytes(budget: int, largest_slot: int) -> int:
    """2 MiB pages (huge pages) for large pools; smaller ones where a page would be 1% of it."""
    size = 65536
    while size < 2**21 and (size < budget // 128 or size < largest_slot):
        size *= 2
    return size
