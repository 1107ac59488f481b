"""The vectorised simulator: its cost is per job event, never per device.

Between two job events every stream of devices feeds one request. The devices that a request will
get are therefore a slice of the merged rows of its streams: the slice is computed once, when the
set of streams changes, together with the answer times, and cut short when the set changes again.
Agrees with :mod:`reference` to the device.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from raysys.errors import ConfigError
from raysys.federated.venn.requests import Plan, Policy
from raysys.federated.venn.simulator.jobs import SimConfig, SimJob
from raysys.federated.venn.simulator.results import SimResult
from raysys.federated.venn.simulator.rounds import (
    CHECKIN,
    CLOSE,
    DEADLINE,
    OPEN,
    RETURN,
    TIMER,
    Run,
    draw_priority,
)
from raysys.federated.venn.simulator.trace import Floats, Ints, Trace
from raysys.federated.venn.simulator.world import World

FILL = 4
Event = tuple[float, int, int, int, int, int]


def simulate(
    trace: Trace, jobs: Sequence[SimJob], policy: Policy, config: SimConfig | None = None
) -> SimResult:
    """Run all jobs to their end or to the end of the repeated trace.

    Raises:
        ConfigError: no jobs, or a policy that draws per device (use ``simulate_by_event``).
        InfeasibleError: no device is eligible for some job.
    """
    if getattr(policy, "per_device", False):
        raise ConfigError("policy", type(policy).__name__, "one that orders requests")
    return _Engine(World.of(trace, jobs, policy, config or SimConfig())).run()


@dataclass(slots=True)
class _Segment:
    """Devices that a request gets while its set of streams stays as it is."""

    streams: int
    rows: Ints
    first: int
    positions: Ints
    answers: Floats


@dataclass(eq=False, slots=True)
class _Engine:
    world: World
    heap: list[Event] = field(default_factory=list)
    segments: dict[int, _Segment] = field(default_factory=dict)
    stamps: list[int] = field(default_factory=list)
    outstanding: list[list[tuple[float, bool]]] = field(default_factory=list)

    def run(self) -> SimResult:
        world = self.world
        self.stamps = [0] * len(world.runs)
        self.outstanding = [[] for _ in world.runs]
        for run in world.runs:
            self._push(run.job.arrival_s, TIMER, OPEN, run.index, OPEN, 0)
        position = 0
        while self.heap and world.unfinished:
            time_s, phase, order, index, kind, stamp = heapq.heappop(self.heap)
            if time_s >= world.horizon_s:
                break
            if not self._valid(index, kind, stamp):
                continue
            position = order + 1 if phase == CHECKIN else world.trace.position_at(time_s)
            world.events += 1
            self._handle(world.runs[index], kind, time_s, position)
        return world.result(position)

    def _push(
        self, time_s: float, phase: int, order: int, index: int, kind: int, mark: int
    ) -> None:
        heapq.heappush(self.heap, (time_s, phase, order, index, kind, mark))

    def _valid(self, index: int, kind: int, stamp: int) -> bool:
        if kind == OPEN:
            return True
        if kind == DEADLINE:
            run = self.world.runs[index]
            return run.open and run.request.attempt == stamp
        return self.stamps[index] == stamp

    def _handle(self, run: Run, kind: int, time_s: float, position: int) -> None:
        if kind == OPEN:
            self._open(run, time_s)
        elif kind == FILL:
            self._filled(run, position)
        elif kind == RETURN:
            self._returned(run, time_s, position)
        else:
            unfilled = run.index in self.world.waiting
            self._settle(run, position)
            answered = run.answered_by(time_s)
            success = kind == CLOSE or self.world.config.succeeds(
                run.job.participants, run.taken, answered
            )
            self._end(run, time_s, success)
            if success and not unfilled:
                return
        self._replan(time_s, position, run.index)

    def _open(self, run: Run, time_s: float) -> None:
        attempt = run.request.attempt + 1
        run.start_attempt(time_s, draw_priority(self.world.config.seed, run.index, attempt))
        self.world.waiting[run.index] = run.request
        if run.job.kind == "sync":
            due_s = time_s + run.job.deadline_s
            self._push(due_s, TIMER, DEADLINE, run.index, DEADLINE, attempt)

    def _end(self, run: Run, time_s: float, success: bool) -> None:
        self.stamps[run.index] += 1
        self.world.closed(run, time_s, success)
        if not success:
            self._open(run, time_s)
        elif not np.isfinite(run.result.finish_s):
            opens_s = time_s + self.world.config.next_round_s
            self._push(opens_s, TIMER, OPEN, run.index, OPEN, 0)

    def _filled(self, run: Run, position: int) -> None:
        self._settle(run, position)
        run.request.remaining = 0
        del self.world.waiting[run.index]
        if run.job.kind == "buffered":
            self._schedule_return(run)
            return
        self._schedule_close(run)

    def _replan(self, time_s: float, position: int, cause: int) -> None:
        """Ask the policy, and give the requests whose streams changed a new segment."""
        self._count_remaining(position)
        wanted = self._streams(self.world.plan(time_s))
        changed = [index for index in self.segments if wanted.get(index) != self._fed_by(index)]
        for index in changed:
            self._settle(self.world.runs[index], position)
        for index, streams in wanted.items():
            if index not in self.segments:
                self._begin(self.world.runs[index], streams, position)
        for index in {cause, *changed}:
            if index not in self.segments:
                self._reschedule_starved(self.world.runs[index])

    def _fed_by(self, index: int) -> int:
        return self.segments[index].streams

    def _count_remaining(self, position: int) -> None:
        for index, segment in self.segments.items():
            run = self.world.runs[index]
            count = self.world.trace.count_before(segment.rows, position) - segment.first
            wanted = run.request.demand if run.job.kind == "sync" else run.pending
            run.request.remaining = wanted - run.taken - count

    def _streams(self, plan: Plan) -> dict[int, int]:
        """Bitset of streams for every request that some device would go to now."""
        classes = self.world.trace.classes
        every = (1 << classes) - 1
        wanted: dict[int, int] = {}
        for atom in range(len(self.world.trace.masks)):
            left = every
            for request in plan.ranking(atom):
                take = left & request.classes
                if take:
                    index = request.job
                    wanted[index] = wanted.get(index, 0) | take << atom * classes
                    left &= ~take
                    if not left:
                        break
        return wanted

    def _settle(self, run: Run, position: int) -> None:
        """Book the devices of the current segment up to ``position`` and drop the segment."""
        segment = self.segments.pop(run.index, None)
        self.stamps[run.index] += 1
        if segment is None:
            return
        count = self.world.trace.count_before(segment.rows, position) - segment.first
        run.take(segment.positions[:count], segment.answers[:count])
        if run.job.kind == "buffered" and count:
            self._expect_returns(run, segment.positions[:count], segment.answers[:count])

    def _begin(self, run: Run, streams: int, position: int) -> None:
        trace = self.world.trace
        rows = trace.rows_of(streams)
        if not len(rows):
            return
        first = trace.count_before(rows, position)
        last = first + run.request.remaining
        end_s = self.world.horizon_s
        if run.job.kind == "sync":
            end_s = min(end_s, run.attempt_s + run.job.deadline_s)
        last_possible = trace.count_before(rows, trace.position_at(end_s))
        positions = _slice(rows, first, max(min(last, last_possible), first), len(trace))
        answers = self.world.answer_times(run.job, positions)
        self.segments[run.index] = _Segment(streams, rows, first, positions, answers)
        self.stamps[run.index] += 1
        self._predict(run, positions, answers, filled=last <= last_possible)

    def _predict(self, run: Run, positions: Ints, answers: Floats, filled: bool) -> None:
        """Push the next event of a segment: filled, or enough answers (a return) before that."""
        stamp = self.stamps[run.index]
        fill_s = self.world.trace.time_of(int(positions[-1])) if filled else np.inf
        if run.job.kind == "buffered":
            next_s, kind = self._next_return(run, positions, answers), RETURN
        else:
            next_s, kind = _kth_smallest([*run.answers, answers], run.needed), CLOSE
        if next_s <= fill_s:
            if np.isfinite(next_s):
                self._push(next_s, TIMER, kind, run.index, kind, stamp)
        else:
            self._push(fill_s, CHECKIN, int(positions[-1]), run.index, FILL, stamp)

    def _reschedule_starved(self, run: Run) -> None:
        """A request that lost all streams may still be closed by devices that it has."""
        if run.job.kind == "buffered":
            self._schedule_return(run)
        elif run.open:
            self._schedule_close(run)

    def _schedule_close(self, run: Run) -> None:
        close_s = _kth_smallest(run.answers, run.needed)
        if np.isfinite(close_s):
            self._push(close_s, TIMER, CLOSE, run.index, CLOSE, self.stamps[run.index])

    def _next_return(self, run: Run, positions: Ints, answers: Floats) -> float:
        waiting = self.outstanding[run.index]
        earliest = waiting[0][0] if waiting else np.inf
        if len(positions):
            earliest = min(earliest, float(self._return_times(positions, answers).min()))
        return earliest

    def _return_times(self, positions: Ints, answers: Floats) -> Floats:
        return np.where(np.isfinite(answers), answers, self.world.offline_times(positions))

    def _expect_returns(self, run: Run, positions: Ints, answers: Floats) -> None:
        times = self._return_times(positions, answers)
        for time_s, answered in zip(times.tolist(), np.isfinite(answers).tolist()):
            heapq.heappush(self.outstanding[run.index], (time_s, answered))

    def _schedule_return(self, run: Run) -> None:
        waiting = self.outstanding[run.index]
        if waiting:
            stamp = self.stamps[run.index]
            self._push(waiting[0][0], TIMER, RETURN, run.index, RETURN, stamp)

    def _returned(self, run: Run, time_s: float, position: int) -> None:
        """Devices of a buffered job answered or failed: count them and ask for replacements."""
        self._settle(run, position)
        waiting = self.outstanding[run.index]
        while waiting and waiting[0][0] <= time_s and self.world.unfinished:
            _, answered = heapq.heappop(waiting)
            if run.device_returned(time_s, answered):
                self.world.waiting.pop(run.index, None)
                self.world.unfinished -= 1
                waiting.clear()
                return
        self.world.waiting[run.index] = run.request
        run.request.remaining = run.pending - run.taken


def _slice(rows: Ints, first: int, last: int, period_rows: int) -> Ints:
    """Virtual positions of the entries ``[first, last)`` of the endlessly repeated ``rows``."""
    period, low = divmod(first, len(rows))
    high = low + last - first
    if high <= len(rows):
        return rows[low:high] + period * period_rows
    periods, places = np.divmod(np.arange(first, last), len(rows))
    positions: Ints = rows[places] + periods * period_rows
    return positions


def _kth_smallest(parts: Sequence[Floats], k: int) -> float:
    """The k-th smallest value, infinite when there are fewer."""
    if sum(len(part) for part in parts) < k:
        return float("inf")
    joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return float(np.partition(joined, k - 1)[k - 1])
