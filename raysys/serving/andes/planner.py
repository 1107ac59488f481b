"""The planner: which requests run until the next plan. A pure function of a snapshot.

Andes (arXiv 2404.16283), scheduling problem and solver: for each batch size of a window, an exact-K
knapsack by gain per context length; the best one is refined. Requests that the victim gate protects
are packed first and cannot be paused.
"""

from __future__ import annotations

import numpy as np

from raysys.serving.andes.models import RestoreModel, StepTime
from raysys.serving.andes.options import OBJECTIVES, Objective, PlannerConfig, shortage_tokens
from raysys.serving.andes.packing import greedy_order
from raysys.serving.andes.refiner import Refiner
from raysys.serving.andes.snapshot import IntArray, Mode, Plan, Snapshot
from raysys.serving.andes.valuation import Valuation

__all__ = ["OBJECTIVES", "Objective", "Planner", "PlannerConfig"]


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
        values = Valuation(
            self.config, snapshot, step_time, restore, mode, boost, drain_tokens_per_s
        )
        return _solve(values)

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


def _solve(values: Valuation) -> Plan:
    """Walk the newcomers by priority, pausing the fullest readers where that pays."""
    s = values.snapshot
    batch, value_N, gain_N = values.best_batch()
    order = greedy_order(value_N, values.size_N, per_weight=values.config.per_length)
    free_N = values.victim_N | values.waiting_N
    keep_N = s.running & ~values.victim_N
    room = s.capacity_tokens - float(values.size_N[keep_N].sum())
    chosen = values.pack(np.where(free_N, value_N, 0.0), batch - int(keep_N.sum()), room)
    selected_N = np.zeros(s.size, dtype=np.bool_)
    selected_N[chosen] = True
    waiting = order[~s.running[order]]
    swap = Refiner(values, batch, value_N, gain_N, selected_N)
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
        mode=values.mode,
        triggered=True,
        batch=batch,
        gain=swap.gain,
        loss=swap.loss,
        starved=int(values.starved_N[admit].sum()),
        reason=swap.reason,
    )


def _by_arrival(snapshot: Snapshot, indices: IntArray) -> IntArray:
    """Oldest submission first; ties by index."""
    order = np.argsort(-snapshot.elapsed_s[indices], kind="stable")
    result: IntArray = indices[order].astype(np.int64)
    return result
