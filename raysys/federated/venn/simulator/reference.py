"""The event-by-event simulator: slow, simple, and the yardstick of the vectorised one.

One loop over single check-ins and single answers. Also the only one that draws a job per device
(random matching as deployed, not as optimised).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from raysys.federated.venn.requests import Plan, Policy, Request
from raysys.federated.venn.simulator.jobs import SimConfig, SimJob
from raysys.federated.venn.simulator.results import SimResult
from raysys.federated.venn.simulator.rounds import (
    CLOSE,
    DEADLINE,
    OPEN,
    RETURN,
    Run,
    draw_priority,
)
from raysys.federated.venn.simulator.trace import Trace, hash_uniform
from raysys.federated.venn.simulator.world import World


def simulate_by_event(
    trace: Trace, jobs: Sequence[SimJob], policy: Policy, config: SimConfig | None = None
) -> SimResult:
    """Run all jobs, one check-in at a time; same result as :func:`engine.simulate`.

    Raises:
        ConfigError: there are no jobs.
        InfeasibleError: no device is eligible for some job.
    """
    return _Loop(World.of(trace, jobs, policy, config or SimConfig())).run()


@dataclass(eq=False, slots=True)
class _Loop:
    world: World
    timers: list[tuple[float, int, int, int]] = field(default_factory=list)
    returns: list[list[tuple[float, bool]]] = field(default_factory=list)
    plan: Plan | None = None

    def run(self) -> SimResult:
        world = self.world
        self.returns = [[] for _ in world.runs]
        for run in world.runs:
            heapq.heappush(self.timers, (run.job.arrival_s, OPEN, run.index, 0))
        position = 0
        while world.unfinished:
            checkin_s = world.trace.time_of(position)
            if self.timers and self.timers[0][0] <= checkin_s:
                if self.timers[0][0] >= world.horizon_s:
                    break
                self._timer(*heapq.heappop(self.timers))
                continue
            if checkin_s >= world.horizon_s:
                break
            self._check_in(position, checkin_s)
            position += 1
        return world.result(position)

    def _check_in(self, position: int, now_s: float) -> None:
        request = self._choose(position)
        if request is None:
            return
        run = self.world.runs[request.job]
        rows = np.asarray([position], dtype=np.int64)
        answers = self.world.answer_times(run.job, rows)
        run.take(rows, answers)
        request.remaining -= 1
        answered = bool(np.isfinite(answers[0]))
        if run.job.kind == "buffered":
            end_s = float(answers[0] if answered else self.world.offline_times(rows)[0])
            heapq.heappush(self.returns[run.index], (end_s, answered))
            heapq.heappush(self.timers, (end_s, RETURN, run.index, 0))
        elif answered:
            attempt = request.attempt
            heapq.heappush(self.timers, (float(answers[0]), CLOSE, run.index, attempt))
        if request.remaining == 0:
            del self.world.waiting[run.index]
            self.plan = self.world.plan(now_s)

    def _choose(self, position: int) -> Request | None:
        if self.plan is None:
            return None
        row = position % len(self.world.trace)
        atom, capability = int(self.world.trace.atom[row]), int(self.world.trace.capability[row])
        ranking = (item for item in self.plan.ranking(atom) if item.classes >> capability & 1)
        if not getattr(self.world.policy, "per_device", False):
            return next(ranking, None)
        eligible = list(ranking)
        if not eligible:
            return None
        draw = float(hash_uniform(np.asarray([position]), self.world.config.seed + 1)[0])
        return eligible[int(draw * len(eligible))]

    def _timer(self, now_s: float, kind: int, index: int, attempt: int) -> None:
        run = self.world.runs[index]
        if kind == OPEN:
            self._open(run, now_s)
            changed = True
        elif kind == RETURN:
            changed = self._return(run, now_s)
        else:
            changed = self._close(run, now_s, kind, attempt)
        if changed:
            self.plan = self.world.plan(now_s)

    def _close(self, run: Run, now_s: float, kind: int, attempt: int) -> bool:
        """End the attempt if its answers suffice or time is up; True if the plan must follow."""
        if not run.open or run.request.attempt != attempt:
            return False
        unfilled = run.index in self.world.waiting
        answered = run.answered_by(now_s)
        if kind == CLOSE and answered < run.needed:
            return False
        success = kind == CLOSE or self.world.config.succeeds(
            run.job.participants, run.taken, answered
        )
        self._end(run, now_s, success)
        return unfilled or not success

    def _open(self, run: Run, now_s: float) -> None:
        attempt = run.request.attempt + 1
        run.start_attempt(now_s, draw_priority(self.world.config.seed, run.index, attempt))
        self.world.waiting[run.index] = run.request
        if run.job.kind == "sync":
            due_s = now_s + run.job.deadline_s
            heapq.heappush(self.timers, (due_s, DEADLINE, run.index, attempt))

    def _end(self, run: Run, now_s: float, success: bool) -> None:
        self.world.closed(run, now_s, success)
        if not success:
            self._open(run, now_s)
        elif not np.isfinite(run.result.finish_s):
            opens_s = now_s + self.world.config.next_round_s
            heapq.heappush(self.timers, (opens_s, OPEN, run.index, 0))

    def _return(self, run: Run, now_s: float) -> bool:
        waiting = self.returns[run.index]
        changed = False
        while run.open and waiting and waiting[0][0] <= now_s:
            _, answered = heapq.heappop(waiting)
            changed = True
            if run.device_returned(now_s, answered):
                self.world.waiting.pop(run.index, None)
                self.world.unfinished -= 1
                break
            run.request.remaining = run.pending - run.taken
            self.world.waiting[run.index] = run.request
        return changed
