"""Values and costs that one plan weighs: gains by batch size, stalls, swaps, and the victim gate.

Andes (arXiv 2404.16283), solver (batch-size window, gain per context length) and overhead-aware
refiner. Ours are the gate that scales with the time to restore the whole KV room, and the value of
a swap by the time in which the queue drains anyway.

Shapes: N requests, W batch sizes, G points of a stall grid.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from raysys.serving.andes.gain import Outlook, buffer_s, outlook, ratio, served_area
from raysys.serving.andes.models import RestoreModel, StepTime
from raysys.serving.andes.objectives import OBJECTIVE_VALUES
from raysys.serving.andes.options import PlannerConfig
from raysys.serving.andes.packing import exact_pack, greedy_pack
from raysys.serving.andes.snapshot import BoolArray, FloatArray, IntArray, Mode, Snapshot


class Valuation:
    """The arrays of one plan: sizes, buffers, who may be paused, gains and losses.

    Args:
        config, snapshot, step_time, restore, mode: as in :meth:`Planner.plan`.
        boost: whether the starvation guard may put one request first.
        drain_tokens_per_s: see :meth:`Planner.plan`.
    """

    def __init__(
        self,
        config: PlannerConfig,
        snapshot: Snapshot,
        step_time: StepTime,
        restore: RestoreModel,
        mode: Mode,
        boost: bool = True,
        drain_tokens_per_s: float = 0.0,
    ) -> None:
        self.config = config
        self.snapshot = snapshot
        self.step_time = step_time
        self.restore = restore
        self.mode = mode
        self.drain_tokens_per_s = drain_tokens_per_s
        self.size_N = snapshot.context_tokens + config.growth_tokens
        self.buffer_N = buffer_s(snapshot)
        restore_N = restore.cost(snapshot.context_tokens)
        self.gate_N = np.maximum(config.guard_s, config.guard_restore_factor * restore_N)
        self.view: Outlook = outlook(snapshot, config.horizon_s)
        self.wait_N = outlook(snapshot, 0.0).wait if config.frozen_wait else self.view.wait
        self.victim_N = self._victims()
        self.starved_N = self._starved(boost)
        self.waiting_N = ~snapshot.running & (self.size_N <= snapshot.capacity_tokens)

    def _victims(self) -> BoolArray:
        """(N,) requests that may be paused: the victim gate and the preemption limit."""
        s, config = self.snapshot, self.config
        if self.mode != "full":
            return np.zeros(s.size, dtype=np.bool_)
        allowed = s.running & s.pausable & (s.preemptions < config.max_preemptions)
        if config.gate:
            room_s = float(self.restore.cost(s.capacity_tokens))
            guard = np.maximum(self.gate_N, config.guard_room_factor * room_s)
            allowed &= self.buffer_N >= guard
        return allowed

    def _starved(self, boost: bool) -> BoolArray:
        """(N,) the longest unserved request beyond the limit, if a boost is due."""
        s = self.snapshot
        starved = np.zeros(s.size, dtype=np.bool_)
        late = ~s.running & (s.unserved_s >= self.config.max_wait_s) & (self.buffer_N <= 0.0)
        if boost and late.any():
            starved[int(np.argmax(np.where(late, s.unserved_s, -1.0)))] = True
        return starved

    def _window(self) -> IntArray:
        """Batch sizes worth trying: from "everyone faster than reading" to "memory is full"."""
        s = self.snapshot
        sizes = np.sort(self.size_N)
        most = int(np.searchsorted(np.cumsum(sizes), s.capacity_tokens, side="right"))
        most = max(1, min(most, s.max_batch))
        sizes_B = np.arange(1, most + 1)
        context_B = np.minimum(sizes_B * float(s.context_tokens.mean()), s.capacity_tokens)
        fast = self.step_time.predict(sizes_B, 0.0, context_B) <= float(s.tau_s.min())
        least = int(sizes_B[fast][-1]) if fast.any() else 1
        protected = int((s.running & ~self.victim_N).sum())
        least = min(max(least, protected, 1), most)
        affordable = max(3, 20_000 // max(1, s.size))  # a plan stays within milliseconds
        count = min(self.config.batch_candidates, affordable, most - least + 1)
        return np.unique(np.linspace(least, most, count).round().astype(np.int64))

    def best_batch(self) -> tuple[int, FloatArray, FloatArray]:
        """Batch size with the best packing, with the items' values and plain QoE gains."""
        s = self.snapshot
        batch_W = self._window()
        context_W = np.minimum(batch_W * float(s.context_tokens.mean()), s.capacity_tokens)
        latency_W = self.step_time.predict(batch_W, 0.0, context_W)
        gain_WN = self.gain(latency_W[:, None], self.start_delay(latency_W[:, None]))
        value_WN = self.value(gain_WN)
        keep_N = s.running & ~self.victim_N
        if batch_W.size == 1:
            return int(batch_W[0]), value_WN[0], gain_WN[0]
        kept_size, kept = float(self.size_N[keep_N].sum()), int(keep_N.sum())
        free_N = self.victim_N | self.waiting_N
        best, best_row = -np.inf, 0
        for row, batch in enumerate(batch_W):
            value_N = np.where(free_N, value_WN[row], 0.0)
            chosen = self.pack(value_N, int(batch) - kept, s.capacity_tokens - kept_size)
            total = float(value_N[chosen].sum() + value_WN[row][keep_N].sum())
            if total > best + 1e-12:
                best, best_row = total, row
        return int(batch_W[best_row]), value_WN[best_row], gain_WN[best_row]

    def pack(self, value_N: FloatArray, batch: int, room: float) -> IntArray:
        if batch <= 0 or room <= 0:
            return np.empty(0, dtype=np.int64)
        if self.config.solver == "exact":
            unit = max(1.0, self.snapshot.capacity_tokens / 512.0)
            size_N = np.ceil(self.size_N / unit).astype(np.int64)
            return np.flatnonzero(exact_pack(value_N, size_N, batch, int(room / unit)))
        config = self.config
        return greedy_pack(
            value_N,
            self.size_N,
            batch,
            room,
            per_weight=config.per_length,
            skip_misfits=config.skip_misfits,
        )

    def start_delay(self, latency_W1: npt.ArrayLike) -> FloatArray:
        """(W, N) stall before a request's first step: its own restore and the extra steps."""
        s = self.snapshot
        extra = np.floor(s.missing_tokens / s.step_tokens) * np.asarray(latency_W1)
        delay: FloatArray = self.restore.cost(s.missing_tokens) + extra
        return delay

    def gain(self, latency_W1: FloatArray, delay_WN: FloatArray) -> FloatArray:
        """(W, N) Qserve - Qwait."""
        area = self.view.consumed + served_area(self.snapshot, self.view, latency_W1, delay_WN)
        gain: FloatArray = np.minimum(1.0, ratio(area, self.view.ideal)) - self.wait_N
        return gain

    def value(self, gain_WN: FloatArray) -> FloatArray:
        """(W, N) what an item is worth under the objective, with weight, bonus and guard."""
        s, config = self.snapshot, self.config
        value = OBJECTIVE_VALUES[config.objective](config, s, self.wait_N, gain_WN)
        value = value * s.weight * np.where(s.running, config.running_bonus, 1.0)
        result: FloatArray = np.where(self.starved_N, 1e9, value)
        return result

    def stall_loss(self, latency_s: float) -> Callable[[float], float]:
        """Total QoE that everybody loses by standing still, as a function of the seconds."""
        s = self.snapshot
        grid = np.array([0.0, 0.25, 1.0, 4.0])
        base = self.start_delay(latency_s)
        gain_GN = self.gain(np.array([[latency_s]]), base[None, :] + grid[:, None])
        counted = s.running if not self.config.charge_waiting else s.running | self.waiting_N
        loss_G = ((gain_GN[0] - gain_GN) * (s.weight * counted)).sum(axis=1)
        points = list(zip(grid.tolist(), loss_G.tolist()))
        return lambda seconds: _interpolate(points, seconds)

    def swap_gain(self, latency_s: float) -> FloatArray:
        """(N,) what serving a request now gains over serving it when the queue has drained.

        A swap moves the whole queue forward by one place; summed over the queue, that is worth
        the difference between being served now and being served last. Near saturation the queue
        drains in seconds and a swap gains little, whatever its gain over the whole horizon.
        """
        s = self.snapshot
        hungry_N = self.waiting_N & (self.buffer_N <= self.config.guard_s)
        queue = float(self.size_N[hungry_N].sum()) - s.free_tokens
        horizon = self.config.horizon_s
        drain_s = horizon
        if self.drain_tokens_per_s > 0.0:
            drain_s = min(horizon, max(0.0, queue) / self.drain_tokens_per_s)
        delay_N = self.start_delay(latency_s)
        gain_2N = self.gain(np.array([[latency_s]]), np.stack([delay_N, delay_N + drain_s]))
        gain: FloatArray = (gain_2N[0] - gain_2N[1]) * s.weight
        return gain


def _interpolate(points: list[tuple[float, float]], x: float) -> float:
    """Piecewise linear through ``points`` in ascending x; flat beyond the last one."""
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]
