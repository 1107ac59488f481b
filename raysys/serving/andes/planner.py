"""The planner: which requests run until the next plan. A pure function of a snapshot.

Andes (arXiv 2404.16283), scheduling problem, solver and overhead-aware refiner. Where we differ:
requests that the victim gate protects are packed first and cannot be paused; a rejected swap stops
further pauses but not admissions into free room; restore time is charged to waiting requests too;
a shortage that the engine would solve by evicting its newest request is solved by pausing the
reader with the most unread text.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from raysys.config import check_choice, check_range
from raysys.serving.andes.gain import Outlook, buffer_s, outlook, ratio, served_area
from raysys.serving.andes.models import RestoreModel, StepTime
from raysys.serving.andes.packing import exact_pack, greedy_order, pack
from raysys.serving.andes.snapshot import BoolArray, FloatArray, IntArray, Mode, Plan, Snapshot

Objective = Literal["mean", "maxmin", "perfect", "tail"]
OBJECTIVES: tuple[Objective, ...] = ("mean", "maxmin", "perfect", "tail")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannerConfig:
    """Options of the planner; the defaults are the measured ones of ``docs/andes.md``.

    Args:
        objective: mean QoE, max-min QoE, number of perfect requests, or a tail target.
        horizon_s: look-ahead of the gain.
        watermark: KV occupancy that triggers planning.
        plan_every: most steps between two plans while something waits.
        growth_tokens: KV kept free per request when admitting, so that running answers can grow.
        running_bonus: factor on a running request's value, against churn.
        max_preemptions: pauses per request; 0 never pauses.
        gate: protect readers with little unread text from being paused.
        guard_s: smallest unread text that makes a request a victim.
        guard_restore_factor: the gate is at least this many of the request's restore times.
        guard_room_factor: the gate is at least this many times what restoring the whole KV room
            takes. Readers drain in about the gate's time, so at most one part in this factor of
            the engine's time can go into restores.
        refiner: accept a swap only if it gains more than its restore time costs everybody.
        charge_waiting: count that cost for waiting requests too.
        per_length: divide the value by the context length.
        skip_misfits: go on after a request that does not fit.
        solver: ``"greedy"``, or ``"exact"`` (dynamic programming; slow, for studies).
        batch_candidates: batch sizes tried in the window.
        max_wait_s: starvation guard: a reader without text, unserved for so long, goes first.
        starved_every_s: at most one such boost per so many seconds; without a limit a long overload
            turns every order into order of arrival.
        tail_target: q* of the tail objective.
    """

    objective: Objective = "mean"
    horizon_s: float = 50.0
    watermark: float = 0.90
    plan_every: int = 10
    growth_tokens: float = 18.0
    running_bonus: float = 1.1
    max_preemptions: int = 3
    gate: bool = True
    guard_s: float = 2.0
    guard_restore_factor: float = 3.0
    guard_room_factor: float = 16.0
    refiner: bool = True
    charge_waiting: bool = True
    per_length: bool = True
    skip_misfits: bool = True
    solver: Literal["greedy", "exact"] = "greedy"
    batch_candidates: int = 8
    max_wait_s: float = 60.0
    starved_every_s: float = 5.0
    tail_target: float = 0.95

    def __post_init__(self) -> None:
        check_choice(self, "objective", OBJECTIVES)
        check_choice(self, "solver", ("greedy", "exact"))
        check_range(self, "horizon_s", 0.0, 3600.0, low_open=True)
        check_range(self, "watermark", 0.0, 1.0, low_open=True)
        check_range(self, "plan_every", 1)
        check_range(self, "growth_tokens", 0.0)
        check_range(self, "running_bonus", 1.0)
        check_range(self, "max_preemptions", 0)
        check_range(self, "guard_s", 0.0)
        check_range(self, "guard_restore_factor", 0.0)
        check_range(self, "guard_room_factor", 0.0)
        check_range(self, "batch_candidates", 1, 64)
        check_range(self, "max_wait_s", 0.0, low_open=True)
        check_range(self, "starved_every_s", 0.0)
        check_range(self, "tail_target", 0.0, 1.0)


def shortage_tokens(config: PlannerConfig, running: int) -> float:
    """Free KV room below which the engine might evict somebody before the next plan."""
    return (config.plan_every + 1.0) * running


class Planner:
    """Plans from snapshots; holds options only, so equal inputs give equal plans."""

    def __init__(self, config: PlannerConfig | None = None) -> None:
        self.config = config or PlannerConfig()

    def plan(
        self,
        snapshot: Snapshot,
        step_time: StepTime,
        restore: RestoreModel,
        mode: Mode = "full",
        *,
        boost: bool = True,
        drain_tokens_per_s: float = 0.0,
    ) -> Plan:
        """Decide what to pause and what to admit before the next step.

        Args:
            snapshot: the engine between two steps.
            step_time: current latency model.
            restore: current restore-cost model.
            mode: ``"admission_only"`` never pauses, ``"fcfs"`` keeps the order of arrival.
            boost: whether the starvation guard may put one request first now.
            drain_tokens_per_s: KV room that finishing requests release, less the growth of the
                running ones; 0 where unknown, then swaps count their full gain.
        """
        waiting = ~snapshot.running
        if mode == "fcfs" or not self.triggered(snapshot, step_time):
            order = _by_arrival(snapshot, np.flatnonzero(waiting))
            reason = "fcfs" if mode == "fcfs" else "nothing is short"
            return Plan(admit=order, batch_cap=snapshot.max_batch, mode=mode, reason=reason)
        parts = _Round(self.config, snapshot, step_time, restore, mode, boost)
        parts.drain_tokens_per_s = drain_tokens_per_s
        return parts.solve()

    def triggered(self, snapshot: Snapshot, step_time: StepTime) -> bool:
        """Whether memory or compute is short: otherwise everything that fits is admitted."""
        if snapshot.free_tokens < shortage_tokens(self.config, int(snapshot.running.sum())):
            return True
        if snapshot.running.all():
            return False
        used = snapshot.capacity_tokens - snapshot.free_tokens
        if used >= self.config.watermark * snapshot.capacity_tokens:
            return True
        waiting = ~snapshot.running
        growth = self.config.growth_tokens * snapshot.size
        if snapshot.context_tokens[waiting].sum() + growth > snapshot.free_tokens:
            return True
        if snapshot.size > snapshot.max_batch:
            return True
        latency = float(step_time.predict(int(snapshot.running.sum()), 0.0, used))
        return latency > float(snapshot.tau_s.min())


class _Round:
    """One plan under way: the arrays that its parts share."""

    def __init__(
        self,
        config: PlannerConfig,
        snapshot: Snapshot,
        step_time: StepTime,
        restore: RestoreModel,
        mode: Mode,
        boost: bool,
    ) -> None:
        self.config = config
        self.snapshot = snapshot
        self.step_time = step_time
        self.restore = restore
        self.mode = mode
        self.drain_tokens_per_s = 0.0
        self.size_N = snapshot.context_tokens + config.growth_tokens
        self.buffer_N = buffer_s(snapshot)
        restore_N = restore.cost(snapshot.context_tokens)
        self.gate_N = np.maximum(config.guard_s, config.guard_restore_factor * restore_N)
        self.view: Outlook = outlook(snapshot, config.horizon_s)
        self.wait_N = self.view.wait
        self.victim_N = self._victims()
        self.starved_N = self._starved(boost)
        self.waiting_N = ~snapshot.running & (self.size_N <= snapshot.capacity_tokens)

    def solve(self) -> Plan:
        batch, value_N, gain_N = self._best_batch()
        order = greedy_order(value_N, self.size_N, per_weight=self.config.per_length)
        return self._refine(batch, value_N, gain_N, order)

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
        count = min(self.config.batch_candidates, most - least + 1)
        return np.unique(np.linspace(least, most, count).round().astype(np.int64))

    def _best_batch(self) -> tuple[int, FloatArray, FloatArray]:
        """Batch size with the best packing, with the items' values and plain QoE gains."""
        s = self.snapshot
        batch_W = self._window()
        context_W = np.minimum(batch_W * float(s.context_tokens.mean()), s.capacity_tokens)
        latency_W = self.step_time.predict(batch_W, 0.0, context_W)
        gain_WN = self._gain(latency_W[:, None], self._start_delay(latency_W[:, None]))
        value_WN = self._value(gain_WN)
        keep_N = s.running & ~self.victim_N
        if batch_W.size == 1:
            return int(batch_W[0]), value_WN[0], gain_WN[0]
        kept_size, kept = float(self.size_N[keep_N].sum()), int(keep_N.sum())
        free_N = self.victim_N | self.waiting_N
        best, best_row = -np.inf, 0
        for row, batch in enumerate(batch_W):
            value_N = np.where(free_N, value_WN[row], 0.0)
            chosen = self._pack(value_N, int(batch) - kept, s.capacity_tokens - kept_size)
            total = float(value_N[chosen].sum() + value_WN[row][keep_N].sum())
            if total > best + 1e-12:
                best, best_row = total, row
        return int(batch_W[best_row]), value_WN[best_row], gain_WN[best_row]

    def _pack(self, value_N: FloatArray, batch: int, room: float) -> IntArray:
        if batch <= 0 or room <= 0:
            return np.empty(0, dtype=np.int64)
        if self.config.solver == "exact":
            unit = max(1.0, self.snapshot.capacity_tokens / 512.0)
            size_N = np.ceil(self.size_N / unit).astype(np.int64)
            return np.flatnonzero(exact_pack(value_N, size_N, batch, int(room / unit)))
        order = greedy_order(value_N, self.size_N, per_weight=self.config.per_length)
        skip = self.config.skip_misfits
        return pack(order, value_N, self.size_N, batch, room, skip_misfits=skip)

    def _start_delay(self, latency_W1: npt.ArrayLike) -> FloatArray:
        """(W, N) stall before a request's first step: its own restore and the extra steps."""
        s = self.snapshot
        extra = np.floor(s.missing_tokens / s.step_tokens) * np.asarray(latency_W1)
        delay: FloatArray = self.restore.cost(s.missing_tokens) + extra
        return delay

    def _gain(self, latency_W1: FloatArray, delay_WN: FloatArray) -> FloatArray:
        """(W, N) Qserve - Qwait."""
        area = self.view.consumed + served_area(self.snapshot, self.view, latency_W1, delay_WN)
        gain: FloatArray = np.minimum(1.0, ratio(area, self.view.ideal)) - self.wait_N
        return gain

    def _value(self, gain_WN: FloatArray) -> FloatArray:
        """(W, N) what an item is worth under the objective, with weight, bonus and guard."""
        s, config = self.snapshot, self.config
        value = _OBJECTIVE_VALUES[config.objective](config, s, self.wait_N, gain_WN)
        value = value * s.weight * np.where(s.running, config.running_bonus, 1.0)
        result: FloatArray = np.where(self.starved_N, 1e9, value)
        return result

    def _stall_loss(self, latency_s: float) -> Callable[[float], float]:
        """Total QoE that everybody loses by standing still, as a function of the seconds."""
        s = self.snapshot
        grid = np.array([0.0, 0.25, 1.0, 4.0])
        base = self._start_delay(latency_s)
        gain_GN = self._gain(np.array([[latency_s]]), base[None, :] + grid[:, None])
        counted = s.running if not self.config.charge_waiting else s.running | self.waiting_N
        loss_G = ((gain_GN[0] - gain_GN) * (s.weight * counted)).sum(axis=1)
        points = list(zip(grid.tolist(), loss_G.tolist()))
        return lambda seconds: _interpolate(points, seconds)

    def _swap_gain(self, latency_s: float) -> FloatArray:
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
        delay_N = self._start_delay(latency_s)
        gain_2N = self._gain(np.array([[latency_s]]), np.stack([delay_N, delay_N + drain_s]))
        gain: FloatArray = (gain_2N[0] - gain_2N[1]) * s.weight
        return gain

    def _refine(self, batch: int, value_N: FloatArray, gain_N: FloatArray, order: IntArray) -> Plan:
        """Walk the newcomers by priority, pausing the fullest readers where that pays."""
        s = self.snapshot
        free_N = self.victim_N | self.waiting_N
        keep_N = s.running & ~self.victim_N
        room = s.capacity_tokens - float(self.size_N[keep_N].sum())
        chosen = self._pack(np.where(free_N, value_N, 0.0), batch - int(keep_N.sum()), room)
        selected_N = np.zeros(s.size, dtype=np.bool_)
        selected_N[chosen] = True
        waiting = order[~s.running[order]]
        swap = _Swap(self, batch, value_N, gain_N, selected_N)
        swap.relieve_shortage()
        for index in waiting[selected_N[waiting]]:
            swap.consider(int(index))
        swap.fill(waiting)
        admit = np.array(swap.admit, dtype=np.int64)
        taken_N = np.zeros(s.size, dtype=np.bool_)
        taken_N[admit] = True
        return Plan(
            pause=np.array(swap.pause, dtype=np.int64),
            admit=admit,
            hold=waiting[~taken_N[waiting]],
            batch_cap=max(1, swap.count),
            mode=self.mode,
            triggered=True,
            batch=batch,
            gain=swap.gain,
            loss=swap.loss,
            starved=int(self.starved_N[admit].sum()),
            reason=swap.reason,
        )


class _Swap:
    """The refiner's running account: room, victims, restore seconds, gain and loss."""

    def __init__(
        self,
        parent: _Round,
        batch: int,
        value_N: FloatArray,
        gain_N: FloatArray,
        selected_N: BoolArray,
    ) -> None:
        s = parent.snapshot
        self.parent = parent
        self.batch = batch
        self.value_N = value_N
        self.count = int(s.running.sum())
        grow = parent.config.growth_tokens * self.count
        self.room = s.free_tokens - grow
        victims = np.flatnonzero(parent.victim_N & ~selected_N)
        self.victims = list(victims[np.argsort(-parent.buffer_N[victims], kind="stable")])
        self.pause: list[int] = []
        self.admit: list[int] = []
        self.stall_s = 0.0
        self.gain = 0.0
        self.loss = 0.0
        self.pausing = True
        self.reason = "packed"
        latency = float(parent.step_time.predict(batch))
        self.stall_loss = parent._stall_loss(latency) if parent.config.refiner else None
        self.swap_gain_N = parent._swap_gain(latency)
        self.restore_N = parent.restore.cost(s.context_tokens)
        self.own_N = np.maximum(gain_N, 0.0) * s.weight

    def relieve_shortage(self) -> None:
        """The engine is about to evict its newest request: pause the fullest reader instead."""
        parent, s = self.parent, self.parent.snapshot
        short = shortage_tokens(parent.config, self.count) - s.free_tokens
        if short <= 0.0:
            return
        self.reason = "shortage"
        able_N = s.running & s.pausable
        safe_N = able_N & (parent.buffer_N >= parent.gate_N)
        while short > 0.0 and self.count > 1 and able_N.any():
            index = _best_fit(safe_N, parent.size_N, short)
            if index is None:
                index = int(np.argmax(np.where(able_N, parent.buffer_N, -np.inf)))
            able_N[index] = safe_N[index] = False
            self._evict(index)
            short -= float(parent.size_N[index])
            if index in self.victims:
                self.victims.remove(index)

    def consider(self, index: int) -> None:
        """Admit a chosen newcomer if room can be made and the swap pays."""
        need = float(self.parent.size_N[index])
        picked = self._smallest_set(need)
        if picked is None:
            return
        if picked:
            gain, loss, stall = self._account(index, picked)
            if gain <= loss and not self.parent.starved_N[index]:
                self.pausing = False
                self.reason = "a swap would cost more than it gains"
                return
            self.gain += gain
            self.loss += loss
            self.stall_s += stall
            for victim in picked:
                self._evict(victim)
                self.victims.remove(victim)
        self._take(index)

    def fill(self, waiting: IntArray) -> None:
        """Room that is left goes to whoever fits, best first: idle memory serves nobody."""
        parent = self.parent
        able_N = parent.waiting_N.copy()
        able_N[self.admit] = False
        count = min(max(self.batch, 1), parent.snapshot.max_batch) - self.count
        size_N = parent.size_N
        for index in pack(waiting, able_N.astype(np.float64), size_N, count, self.room):
            self._take(int(index))

    def _smallest_set(self, need: float) -> list[int] | None:
        """Victims, fullest first, that make room; None if room cannot be made."""
        room, count = self.room, self.count
        picked: list[int] = []
        for victim in self.victims:
            if room >= need and count < self.batch:
                break
            picked.append(int(victim))
            room += float(self.parent.size_N[victim])
            count -= 1
        if room < need or count >= self.parent.snapshot.max_batch:
            return None
        return picked if not picked or self.pausing else None

    def _account(self, index: int, picked: list[int]) -> tuple[float, float, float]:
        """Gain, loss and restore seconds of swapping ``picked`` for ``index``."""
        gain = float(self.swap_gain_N[index])
        if self.stall_loss is None:
            return gain, 0.0, 0.0
        own = sum(float(self.own_N[victim]) for victim in picked)
        stall = sum(float(self.restore_N[victim]) for victim in picked)
        before, after = self.stall_loss(self.stall_s), self.stall_loss(self.stall_s + stall)
        return gain, own + after - before, stall

    def _evict(self, victim: int) -> None:
        self.pause.append(victim)
        self.room += float(self.parent.size_N[victim])
        self.count -= 1

    def _take(self, index: int) -> None:
        self.admit.append(index)
        self.room -= float(self.parent.size_N[index])
        self.count += 1


def _best_fit(able_N: BoolArray, size_N: FloatArray, need: float) -> int | None:
    """The smallest that covers ``need``, else the largest: restoring costs by the token."""
    if not able_N.any():
        return None
    enough_N = able_N & (size_N >= need)
    if enough_N.any():
        return int(np.argmin(np.where(enough_N, size_N, np.inf)))
    return int(np.argmax(np.where(able_N, size_N, -np.inf)))


def _interpolate(points: list[tuple[float, float]], x: float) -> float:
    """Piecewise linear through ``points`` in ascending x; flat beyond the last one."""
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]


ObjectiveValue = Callable[[PlannerConfig, Snapshot, FloatArray, FloatArray], FloatArray]


def _mean(_: PlannerConfig, __: Snapshot, ___: FloatArray, gain_WN: FloatArray) -> FloatArray:
    return gain_WN


def _maxmin(_: PlannerConfig, s: Snapshot, wait_N: FloatArray, gain_WN: FloatArray) -> FloatArray:
    """``max(Q_min - Qwait, 0)`` with Q_min the worst current QoE; only where service helps."""
    lowest = float(outlook(s, 0.0).wait.min())
    result: FloatArray = np.where(gain_WN > 0.0, np.maximum(lowest - wait_N, 0.0), 0.0)
    return result


def _perfect(_: PlannerConfig, s: Snapshot, wait_N: FloatArray, gain_WN: FloatArray) -> FloatArray:
    """One for each request that is perfect now and stays so only if it is served."""
    sharp = 1.0 - 1e-6
    now_N = outlook(s, 0.0).wait >= sharp
    result: FloatArray = (now_N & (wait_N < sharp) & (wait_N + gain_WN >= sharp)).astype(np.float64)
    return result


def _tail(
    config: PlannerConfig, _: Snapshot, wait_N: FloatArray, gain_WN: FloatArray
) -> FloatArray:
    """Distance below the target, where service helps."""
    short = np.maximum(0.0, config.tail_target - wait_N)
    result: FloatArray = np.where(gain_WN > 0.0, short, 0.0)
    return result


_OBJECTIVE_VALUES: dict[str, ObjectiveValue] = {
    "mean": _mean,
    "maxmin": _maxmin,
    "perfect": _perfect,
    "tail": _tail,
}


def _by_arrival(snapshot: Snapshot, indices: IntArray) -> IntArray:
    """Oldest submission first; ties by index."""
    order = np.argsort(-snapshot.elapsed_s[indices], kind="stable")
    result: IntArray = indices[order].astype(np.int64)
    return result
