"""Rows of the reference store: lookup, fused update and the state of each row.

The first half of the reference twin; ``fiited_reference.py`` adds the adjustment rounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from raysys.errors import CapabilityError, ConfigError
from raysys.ops import fiited_abi as abi
from raysys.ops.fiited_arithmetic import (
    F32,
    ReferenceSketch,
    dot_chunks,
    mix,
    noise_seed,
    round_nearest,
    round_noisy,
    uniform,
    virtual_row,
)

I64 = npt.NDArray[np.int64]
ONE = np.float32(1)


@dataclass(slots=True)
class ReferenceRow:
    """A resident row: state of the optimizer, utilities [k], weights and states [k, 1 + s, C]."""

    values: F32
    utility: F32
    acc: np.float32
    alive: int = 0
    pinned: bool = False
    grown: int = 0
    touched: int = 0
    updates: int = 0


@dataclass(slots=True)
class ReferenceBatch:
    """Distinct rows of a lookup in order of appearance, and where each value goes."""

    keys: list[tuple[int, int]]
    counts: list[int]
    inverse: list[int]
    bags: list[int]
    scale: F32 | None
    columns: I64
    train: bool
    used: bool = False

    @property
    def rows(self) -> int:
        return len(self.keys)


@dataclass(slots=True)
class _Clock:
    step: int = 0
    round: int = 0
    scale: float = 1.0
    cut: np.float32 = field(default_factory=lambda: np.float32(-1))
    tie: int = 0
    weight: float = 0.0


class ReferenceRows:
    """Lookup and update on dictionaries; see ``NativeEngine`` for their meaning."""

    def __init__(self, config: abi.StoreConfig, tables: list[abi.TableConfig]) -> None:
        if config.layout == abi.LAYOUTS["dense"]:
            raise CapabilityError("the dense store", "it is compiled code", "Install a compiler")
        self.c, self.tables = config, tables
        self.states = (0, 0, 1, 2)[config.optimizer]
        self.lanes = 8 if config.chunk % 8 == 0 else 4
        self.rows: dict[tuple[int, int], ReferenceRow] = {}
        self.sketch_table = ReferenceSketch(config.sketch_cells)
        self.queue: dict[tuple[int, int], np.float32] = {}
        self.window: F32 = np.zeros(abi.BINS, np.float32)
        self.clock_ = _Clock()
        self.alive = 0
        self.frozen = False
        names = "admitted removed grown evicted refused nonfinite lookups hits"
        self.n: dict[str, int] = dict.fromkeys(names.split(), 0)

    def close(self) -> None:
        self.rows.clear()

    def max_slots(self) -> int:
        return 1 << 40

    def freeze(self) -> None:
        self.frozen = True

    # -- lookup and update ----------------------------------------------------------------------

    def lookup(
        self,
        ids: I64,
        starts: I64,
        offsets: I64 | None,
        bags: int,
        mean: bool,
        weights: F32 | None,
        train: bool,
        mask_below: float,
        out: F32,
        columns: I64,
    ) -> ReferenceBatch:
        self._check_not_frozen(train)
        scale = weights.copy() if weights is not None else None
        if mean and offsets is not None and scale is None:
            scale = np.ones(len(ids), np.float32)
        batch = ReferenceBatch([], [], [], [], scale, columns, train)
        index: dict[tuple[int, int], int] = {}
        for t, table in enumerate(self.tables):
            for i in range(int(starts[t]), int(starts[t + 1])):
                key = (t, virtual_row(table, int(ids[i])))
                position = index.setdefault(key, len(batch.keys))
                if position == len(batch.keys):
                    batch.keys.append(key)
                    batch.counts.append(0)
                batch.counts[position] += 1
                batch.inverse.append(position)
            batch.bags += self._bags(batch, t, starts, offsets, bags, mean)
        if train:
            self._count_and_create(batch)
        out[:] = 0
        for i, (position, bag) in enumerate(zip(batch.inverse, batch.bags)):
            t, _ = batch.keys[position]
            width = self.tables[t].chunks * self.c.chunk
            target = out[bag, columns[t] : columns[t] + width]
            target += self._vector(batch.keys[position], mask_below) * (
                ONE if scale is None else scale[i]
            )
        return batch

    def update(self, batch: ReferenceBatch, grad: F32, lr: float, unit: float, strict: bool) -> int:
        if self.frozen or not batch.train:
            self._check_not_frozen(True, "a lookup made in evaluation mode")
        if batch.used:
            raise ConfigError("backward", "a second backward", "one backward per lookup")
        if strict and not np.isfinite(grad).all():
            raise ConfigError("gradient", "NaN or infinity", "finite values")
        batch.used = True
        sums: list[F32 | None] = [None] * batch.rows
        for i, (position, bag) in enumerate(zip(batch.inverse, batch.bags)):
            t, _ = batch.keys[position]
            column = int(batch.columns[t])
            g = grad[bag, column : column + self.tables[t].chunks * self.c.chunk]
            g = g if batch.scale is None else g * batch.scale[i]
            known = sums[position]
            sums[position] = g.copy() if known is None else known + g
        rejected = 0
        for key, count, total in zip(batch.keys, batch.counts, sums):
            assert total is not None
            rejected += not self._apply(key, total, count, np.float32(lr), np.float32(unit))
        return rejected

    def _bags(
        self,
        batch: ReferenceBatch,
        t: int,
        starts: I64,
        offsets: I64 | None,
        bags: int,
        mean: bool,
    ) -> list[int]:
        if offsets is None:
            return list(range(int(starts[t + 1] - starts[t])))
        mine = offsets[t * (bags + 1) : (t + 1) * (bags + 1)]
        found: list[int] = []
        for bag in range(bags):
            low, high = int(mine[bag]), int(mine[bag + 1])
            found += [bag] * (high - low)
            if mean and high > low:
                assert batch.scale is not None
                batch.scale[low:high] /= np.float32(high - low)
        return found

    def _count_and_create(self, batch: ReferenceBatch) -> None:
        for key, count in zip(batch.keys, batch.counts):
            self.n["lookups"] += count
            self.n["hits"] += count * (key in self.rows)
        if self.c.admit_after == 0:
            for t, v in batch.keys:
                if (t, v) not in self.rows and self._free() >= self.tables[t].chunks:
                    self._admit((t, v), (1 << self.tables[t].chunks) - 1, np.float32(0))

    def _vector(self, key: tuple[int, int], mask_below: float) -> F32:
        k, C = self.tables[key[0]].chunks, self.c.chunk
        out = np.zeros((k, C), np.float32)
        row = self.rows.get(key)
        for j in range(k if row else 0):
            assert row is not None
            if row.alive >> j & 1 and not (mask_below > 0 and row.utility[j] < mask_below):
                out[j] = row.values[j, 0]
        return out.reshape(-1)

    def _apply(
        self,
        key: tuple[int, int],
        g: F32,
        count: int,
        lr: np.float32,
        unit: np.float32,
        missing: F32 | None = None,
    ) -> bool:
        k, C = self.tables[key[0]].chunks, self.c.chunk
        row = self.rows.get(key)
        mask = row.alive if row else 0
        gradient = g.reshape(k, C)
        with np.errstate(over="ignore", invalid="ignore"):
            square = dot_chunks(gradient, gradient, self.lanes)
        total, kept = np.float32(0), np.float32(0)
        for j in range(k):
            if missing is not None and not mask >> j & 1:
                square[j] = missing[j] * missing[j]
            total += square[j]
            kept += square[j] if mask >> j & 1 else np.float32(0)
        if not total < np.inf:
            self.n["nonfinite"] += 1
            return False
        if row is None:
            self._miss(key, np.sqrt(total / np.float32(k)), count, unit)
            return True
        clip = np.float32(self.c.clip)
        if clip > 0 and total > clip * clip:
            shrink = clip / np.sqrt(total)
            gradient, square = gradient * shrink, square * (shrink * shrink)
            kept *= shrink * shrink
        noise = noise_seed(key[1], self.c.seed, self.clock_.step) if self.c.half else 0
        self._step(row, noise, gradient, square, kept, count, lr, unit)
        return True

    def _step(
        self,
        row: ReferenceRow,
        noise: int,
        g: F32,
        square: F32,
        kept: np.float32,
        count: int,
        lr: np.float32,
        unit: np.float32,
    ) -> None:
        row.updates += 1
        step = lr
        if self.c.optimizer == abi.OPTIMIZERS["rowwise_adagrad"] and row.alive:
            row.acc = row.acc + kept / np.float32(row.alive.bit_count() * self.c.chunk)
            step = lr / (np.sqrt(row.acc) + np.float32(self.c.eps))
        for j in range(len(g)):
            alive, dot = bool(row.alive >> j & 1), np.float32(0)
            if alive:
                weights = row.values[j, 0]
                dot = np.float32(dot_chunks(g[j], weights, self.lanes))
                grad = g[j]
                if self.c.weight_decay > 0:
                    grad = grad + np.float32(self.c.weight_decay) * weights
                self._step_chunk(row, row.values[j], grad, lr, step)
                if self.c.half:
                    row.values[j, 0] = round_noisy(row.values[j, 0], noise, j * self.c.chunk)
            more = self._utility_step(count, np.sqrt(square[j]), dot, alive, unit)
            row.utility[j] += more * np.float32(self.clock_.scale)
        row.touched = self.clock_.step

    def _step_chunk(
        self, row: ReferenceRow, values: F32, g: F32, lr: np.float32, step: np.float32
    ) -> None:
        eps = np.float32(self.c.eps)
        if self.c.optimizer <= abi.OPTIMIZERS["rowwise_adagrad"]:
            values[0] -= g * step
        elif self.c.optimizer == abi.OPTIMIZERS["adagrad"]:
            values[1] += g * g
            values[0] -= lr * g / (np.sqrt(values[1]) + eps)
        else:
            beta1, beta2 = np.float32(self.c.beta1), np.float32(self.c.beta2)
            bias1 = np.float32(1.0 - math.pow(float(beta1), row.updates))
            bias2 = np.float32(1.0 - math.pow(float(beta2), row.updates))
            values[1] = values[1] * beta1 + g * (ONE - beta1)
            values[2] = values[2] * beta2 + g * g * (ONE - beta2)
            values[0] -= lr * (values[1] / bias1) / (np.sqrt(values[2] / bias2) + eps)

    def _utility_step(
        self, count: int, norm: np.float32, dot: np.float32, alive: bool, unit: np.float32
    ) -> np.float32:
        kind = self.c.utility
        if kind == abi.UTILITIES["grad"]:
            return norm * unit
        if kind == abi.UTILITIES["freq"]:
            return np.float32(count)
        if kind == abi.UTILITIES["saliency"]:
            seen = np.abs(dot) if alive else np.float32(0)
            return np.float32((seen + np.float32(self.c.exploration) * norm) * unit)
        return self._frequency(count) * norm * unit

    def _frequency(self, count: int) -> np.float32:
        a = self.c.frequency_power
        return np.float32(count if a == 1.0 else 1.0 if a == 0.0 else math.pow(count, a))

    def _miss(self, key: tuple[int, int], norm: np.float32, count: int, unit: np.float32) -> None:
        t, v = key
        kind = self.c.utility
        if kind == abi.UTILITIES["freq"]:
            amount = np.float32(count)
        elif kind == abi.UTILITIES["saliency"]:
            amount = np.float32(self.c.exploration) * norm * unit
        else:
            amount = norm * unit
            if kind == abi.UTILITIES["freq_grad"]:
                amount = self._frequency(count) * norm * unit
        noise = mix((v + self.clock_.step) & (2**64 - 1)) & 0xFFFFFFFF
        estimate, seen = self.sketch_table.add(
            v, float(amount * np.float32(self.clock_.scale)), noise
        )
        score = max(np.float32(estimate * np.float32(self.tables[t].weight)), np.float32(1e-37))
        known = seen >= self.c.admit_after and score > self.clock_.cut
        if (self._roomy() or known) and len(self.queue) < self.c.slots:
            self.queue[key] = np.float32(score)

    def _free(self) -> int:
        return int(self.c.slots) - self.alive

    def _roomy(self) -> bool:
        return self._free() * 5 > int(self.c.slots)

    def _target(self) -> int:
        return int(self.c.slots) - int(float(self.c.slots) * float(np.float32(self.c.slack)))

    def _closed(self, bits: int) -> int:
        return bits if self.c.layout == abi.LAYOUTS["chunked"] else bits & ~(bits + 1)

    def _set_alive(self, key: tuple[int, int], row: ReferenceRow, want: int, fresh: bool) -> None:
        for j in range(len(row.utility)):
            if (want ^ row.alive) >> j & 1:
                row.values[j] = 0
                if want >> j & 1 and fresh:
                    first = self._initial(key, j)
                    row.values[j, 0] = round_nearest(first) if self.c.half else first
        more = (want & ~row.alive).bit_count()
        fewer = (row.alive & ~want).bit_count()
        self.alive += more - fewer
        self.n["grown"] += more
        self.n["evicted"] += fewer
        row.alive = want
        if more:
            row.grown = self.clock_.round

    def _admit(self, key: tuple[int, int], want: int, utility: np.float32) -> None:
        k = self.tables[key[0]].chunks
        row = ReferenceRow(
            np.zeros((k, 1 + self.states, self.c.chunk), np.float32),
            np.full(k, utility, np.float32),
            np.float32(self.c.acc0),
            touched=self.clock_.step,
        )
        self.rows[key] = row
        self._set_alive(key, row, want, True)
        self.sketch_table.erase(key[1])
        self.n["admitted"] += 1

    def _initial(self, key: tuple[int, int], j: int) -> F32:
        t, v = key
        C, scale = self.c.chunk, np.float32(self.c.init_scale)
        bound = scale / np.sqrt(np.float32(self.tables[t].chunks * C))
        seed = mix(v ^ mix((self.c.seed + t * 0x51ED2701) & (2**64 - 1)))
        indices = np.arange(j * C, (j + 1) * C, dtype=np.uint64)
        if self.c.init == abi.INITS["uniform"]:
            return np.asarray((np.float32(2) * uniform(seed, indices) - ONE) * bound, np.float32)
        if self.c.init == abi.INITS["constant"]:
            return np.full(C, scale, np.float32)
        if self.c.init == abi.INITS["zeros"]:
            return np.zeros(C, np.float32)
        total = np.zeros(C, np.float32)
        for r in range(4):
            total = total + uniform(seed, indices * np.uint64(4) + np.uint64(r))
        return np.asarray((total - np.float32(2)) * np.float32(1.7320508) * bound, np.float32)

    def _check_not_frozen(self, train: bool, what: str = "a frozen store") -> None:
        if train and (self.frozen or what != "a frozen store"):
            raise ConfigError("update", what, "a training lookup on a store that is not frozen")
