"""Reference twin of ``kernels/fiited_store.cpp``: the same store, row by row, in plain numpy.

It gives the same bits as the compiled store and serves where there is no compiler. It holds every
row in a dictionary, so it has the method's results but neither its speed nor its memory savings.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from raysys.errors import InfeasibleError
from raysys.ops import fiited_abi as abi
from raysys.ops.fiited_arithmetic import (
    F32,
    bits_float,
    float_bits,
    mix,
    tie_of,
    unmix,
    virtual_row,
)
from raysys.ops.fiited_reference_rows import ONE, ReferenceRow, ReferenceRows

I64 = npt.NDArray[np.int64]
Item = tuple[np.float32, int, tuple[int, int], int, bool]  # score, tie, (table, key), chunk, admit


class ReferenceEngine(ReferenceRows):
    """The engine's methods on dictionaries; see ``NativeEngine`` for their meaning."""

    name: Literal["reference"] = "reference"

    def end_step(self, slices: int, compact_rows: int) -> None:
        self._check_not_frozen(True)
        if slices > 0:
            self._slice(slices)
        self.clock_.step += 1

    def round(self) -> None:
        self._check_not_frozen(True)
        salt = mix((self.c.seed + self.clock_.round) & (2**64 - 1))
        self._full_round(salt, self.c.min_alive)
        self._next_round()

    def compact(self, limit: int) -> int:
        return 0

    def set_budget(self, slots: int, bytes_: int) -> None:
        if sum(r.alive.bit_count() for r in self.rows.values() if r.pinned) > slots:
            raise InfeasibleError("the budget", "the pinned rows alone need more chunks")
        self.c.slots = slots
        if self.alive > slots:
            self._full_round(mix((self.c.seed + self.clock_.round) & (2**64 - 1)), -1)

    def _scores(self, key: tuple[int, int], row: ReferenceRow) -> list[np.float32]:
        weight = np.float32(self.tables[key[0]].weight)
        bonus, low = ONE + np.float32(self.c.hysteresis), np.float32(np.inf)
        scores = []
        for j, utility in enumerate(row.utility):
            score = utility * weight * bonus if row.alive >> j & 1 else utility * weight
            if self.c.layout != abi.LAYOUTS["chunked"]:
                low = score = min(low, score)
            scores.append(np.float32(score))
        return scores

    def _chunks(self, low: int, high: int, table: int) -> list[Item]:
        """Every counted chunk of rows in a key range; `admit` marks chunks that are alive."""
        found: list[Item] = []
        for key, row in self.rows.items():
            if low <= key[1] <= high and table in (-1, key[0]):
                for j, score in enumerate(self._scores(key, row)):
                    alive = bool(row.alive >> j & 1)
                    if alive or score > 0:
                        found.append((score, 0, key, j, alive))
        return found

    def _full_round(self, salt: int, min_alive: int) -> None:
        target = self._target()
        churn = max(1, int(float(np.float32(self.c.churn_cap)) * self.c.slots))
        self._unique_queue()
        growers: list[Item] = []
        victims: list[Item] = []
        total = sum(t.dense_rows for t in self.tables)
        for t in range(len(self.tables)) if self.c.by_table else [-1]:
            share = target if t < 0 else int(target * self.tables[t].dense_rows / total)
            chunks = self._chunks(0, 2**64 - 1, t)
            tied = [(i[0], tie_of(i[2][1], i[2][0], salt, i[3])) for i in chunks]
            tied += [
                (score, tie_of(key[1], key[0], salt, 0))
                for key, score in self.queue.items()
                if t in (-1, key[0])
            ]
            tied.sort(reverse=True)
            cut = tied[share] if share < len(tied) else (np.float32(-1), 0)
            if not self.c.by_table:
                self.clock_.cut, self.clock_.tie = cut
            self._plan(chunks, t, cut, salt, min_alive, growers, victims)
        self._exchange(growers, victims, target, churn)

    def _plan(
        self,
        chunks: list[Item],
        table: int,
        cut: tuple[np.float32, int],
        salt: int,
        min_alive: int,
        growers: list[Item],
        victims: list[Item],
    ) -> None:
        for score, _, key, j, alive in chunks:
            tie = tie_of(key[1], key[0], salt, j)
            row = self.rows[key]
            wanted = (score, tie) > cut
            safe = row.pinned or (self.clock_.round - row.grown) % 65536 <= min_alive
            if wanted and not alive:
                growers.append((score, tie, key, j, False))
            elif alive and not wanted and not safe:
                victims.append((score, tie, key, j, False))
        for key, score in self.queue.items():
            tie = tie_of(key[1], key[0], salt, 0)
            if table in (-1, key[0]) and (score, tie) > cut:
                growers.append((score, tie, key, 0, True))

    def _exchange(self, growers: list[Item], victims: list[Item], target: int, churn: int) -> None:
        room, surplus = max(0, target - self.alive), max(0, self.alive - target)
        swaps = min(max(0, len(growers) - room), churn, max(0, len(victims) - surplus))
        grow = min(len(growers), swaps if surplus else room + swaps)
        evict = min(len(victims), surplus + swaps)
        growers.sort(key=lambda i: i[:2], reverse=True)
        victims.sort(key=lambda i: i[:2])
        self._evict(victims[:evict])
        kept = growers[:grow]
        if len(kept) > self._free():
            self.n["refused"] += len(kept) - self._free()
            kept = kept[: max(self._free(), 0)]
        self._grow(kept)
        self.queue.clear()

    def _evict(self, victims: list[Item]) -> None:
        for key, bits in _by_row(victims):
            row = self.rows[key]
            want = self._closed(row.alive & ~bits)
            self._set_alive(key, row, want, False)
            if not want:
                noise = mix((key[1] + self.clock_.step) & (2**64 - 1)) & 0xFFFFFFFF
                self.sketch_table.add(key[1], float(row.utility.max()), noise)
                del self.rows[key]
                self.n["removed"] += 1

    def _grow(self, growers: list[Item]) -> None:
        score_of = {item[2]: item[0] for item in growers if item[4]}
        for key, bits in _by_row(growers):
            row = self.rows.get(key)
            if row is not None:
                self._set_alive(key, row, self._closed(row.alive | bits), False)
            elif key in score_of:
                self._admit(key, 1, score_of[key] / np.float32(self.tables[key[0]].weight))

    def _slice(self, slices: int) -> None:
        index = self.clock_.step % slices
        if index == 0 and self.clock_.step:
            self._next_round()
        width = (2**64 - 1) // slices
        high = 2**64 - 1 if index + 1 == slices else width * (index + 1) - 1
        chunks = self._chunks(width * index, high, -1)
        keep = np.float32(0.9)
        self.window *= keep
        self.clock_.weight = self.clock_.weight * float(keep) + 1.0 / slices
        for item in chunks:
            self.window[float_bits(float(item[0])) >> 16] += ONE
        target = self._target()
        self._set_window_cut(target * self.clock_.weight)
        self._unique_queue()
        growers: list[Item] = []
        victims: list[Item] = []
        cut = (self.clock_.cut, self.clock_.tie)
        salt = mix((self.c.seed + self.clock_.round) & (2**64 - 1))
        self._plan(chunks, -1, cut, salt, self.c.min_alive, growers, victims)
        churn = max(1, int(4.0 * float(np.float32(self.c.churn_cap)) * self.c.slots / slices))
        self._exchange(growers, victims, target, churn)

    def _set_window_cut(self, want: float) -> None:
        self.clock_.cut, self.clock_.tie = np.float32(-1), 0
        above = 0.0
        for b in np.flatnonzero(self.window)[::-1]:
            above += float(self.window[b])
            if above > want:
                self.clock_.cut = bits_float((int(b) << 16) | 0xFFFF)
                self.clock_.tie = 2**64 - 1
                return

    def _unique_queue(self) -> None:
        self.queue = {key: self.queue[key] for key in sorted(self.queue) if key not in self.rows}

    def _next_round(self) -> None:
        self.clock_.round += 1
        self.clock_.scale /= float(np.float32(self.c.gamma))
        if self.clock_.scale <= 2.0**60:
            return
        self.clock_.scale *= 2.0**-60
        for row in self.rows.values():
            row.utility *= np.float32(2.0**-60)
        self.sketch_table.rescale(2.0**-60)
        if self.clock_.cut > 0:
            self.clock_.cut = np.float32(self.clock_.cut * np.float32(2.0**-60))
        self.window[:] = 0
        self.clock_.weight = 0.0

    def inspect(self, table: int, ids: I64) -> tuple[npt.NDArray[np.int32], F32, I64]:
        alive = np.full(len(ids), -1, np.int32)
        utils = np.zeros((len(ids), self.c.max_chunks), np.float32)
        touched = np.full(len(ids), -1, np.int64)
        for i, id_ in enumerate(ids):
            row = self.rows.get((table, virtual_row(self.tables[table], int(id_))))
            if row is not None:
                alive[i], touched[i] = row.alive, row.touched
                utils[i, : len(row.utility)] = row.utility.astype(np.float64) / self.clock_.scale
        return alive, utils, touched

    def shape(self) -> tuple[I64, I64]:
        k = self.c.max_chunks
        lengths = np.zeros((len(self.tables), k + 1), np.int64)
        columns = np.zeros((len(self.tables), k), np.int64)
        for (t, _), row in self.rows.items():
            lengths[t, row.alive.bit_count()] += 1
            columns[t] += [row.alive >> j & 1 for j in range(k)]
        return lengths, columns

    def lengths_by_use(self) -> I64:
        counts = np.zeros((32, self.c.max_chunks + 1), np.int64)
        for row in self.rows.values():
            counts[max(row.updates, 1).bit_length() - 1, row.alive.bit_count()] += 1
        return counts

    def pin(self, table: int, ids: I64, pin: bool) -> None:
        keys = [(table, virtual_row(self.tables[table], int(i))) for i in ids]
        absent = [key for key in keys if key not in self.rows]
        if pin and sum(r.pinned for r in self.rows.values()) + len(keys) > self.c.slots:
            raise InfeasibleError("the budget", "the pinned rows alone need more chunks")
        if pin and len(absent) > self._free():
            raise InfeasibleError("the request", "the pool is full", "Raise the budget")
        for key in keys:
            if pin and key not in self.rows:
                self._admit(key, 1, np.float32(0))
            if key in self.rows:
                self.rows[key].pinned = pin

    def verify(self) -> int:
        alive = sum(row.alive.bit_count() for row in self.rows.values())
        if alive != self.alive or alive > self.c.slots:
            return 2
        prefix = self.c.layout != abi.LAYOUTS["chunked"]
        broken = any(not r.alive or self._closed(r.alive) != r.alive for r in self.rows.values())
        return 3 if broken and prefix else 0

    def counters(self) -> dict[str, float]:
        clock = self.clock_
        per_chunk = self.c.chunk * ((2 if self.c.half else 4) + 4 * self.states)
        numbers = abi.Counters().as_dict() | self.n
        return numbers | {
            "steps": clock.step,
            "round": clock.round,
            "rows": len(self.rows),
            "alive": self.alive,
            "pool_mapped": len(self.rows) * (32 + self.c.max_chunks * (4 + per_chunk)),
            "pool_live": self.alive * per_chunk,
            "sketch_bytes": self.sketch_table.cells.nbytes,
            "sketch_hits": self.sketch_table.hits,
            "sketch_misses": self.sketch_table.misses,
            "queue": len(self.queue),
            "pinned": sum(row.pinned for row in self.rows.values()),
            "scale": clock.scale,
            "cut_score": float(clock.cut),
            "window_weight": clock.weight,
        }

    def virtual_rows(self, table: int, ids: I64) -> npt.NDArray[np.uint64]:
        spec = self.tables[table]
        return np.array([virtual_row(spec, int(i)) for i in ids], np.uint64)

    def raw_ids(self, table: int, keys: npt.NDArray[np.uint64]) -> I64:
        seed = self.tables[table].seed
        return np.array([unmix(int(v)) ^ seed for v in keys], np.uint64).view(np.int64)


def _by_row(items: list[Item]) -> list[tuple[tuple[int, int], int]]:
    """(row, bitmap of chunks) sorted by key, as the compiled store visits them."""
    bits: dict[tuple[int, int], int] = {}
    for _, _, key, j, _ in items:
        bits[key] = bits.get(key, 0) | 1 << j
    return sorted(bits.items(), key=lambda pair: (pair[0][1], pair[0][0]))
