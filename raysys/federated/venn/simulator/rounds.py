"""State of a job during a simulation: what both simulators do alike when rounds open and close."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from raysys.federated.venn.requests import Request
from raysys.federated.venn.simulator.jobs import SimConfig, SimJob
from raysys.federated.venn.simulator.results import JobResult
from raysys.federated.venn.simulator.trace import Floats, Ints, Trace

CLOSE, DEADLINE, OPEN, RETURN = 0, 1, 2, 3
TIMER, CHECKIN = 0, 1


@dataclass(slots=True)
class Run:
    """A job in flight.

    ``answers`` holds absolute answer times of the current attempt in order of assignment, infinite
    for a device that goes offline first; ``rows`` the virtual positions of those devices. A
    buffered job has one endless attempt: ``pending`` is its cumulative demand, ``collected`` its
    answers.
    """

    index: int
    job: SimJob
    result: JobResult
    request: Request
    needed: int
    open: bool = False
    answers: list[Floats] = field(default_factory=list)
    rows: list[Ints] = field(default_factory=list)
    taken: int = 0
    pending: int = 0
    collected: int = 0
    attempt_s: float = 0.0
    again: bool = False

    @classmethod
    def of(cls, index: int, job: SimJob, config: SimConfig) -> Run:
        result = JobResult(index, job.group, job.participants * job.rounds, job.arrival_s)
        request = Request(
            job=index,
            group=job.group,
            demand=job.participants,
            remaining=0,
            rounds=job.rounds,
            registered_s=job.arrival_s,
            response_s=3 * (job.work_s + 2 * job.comm_s),
        )
        return cls(index, job, result, request, config.needed(job.participants))

    def start_attempt(self, now_s: float, draw: float) -> None:
        """Open a new request for the current round; a round keeps its first opening time."""
        request = self.request
        request.remaining = self.job.participants
        self.attempt_s = now_s
        if not self.again:
            request.opened_s = now_s
        request.priority = draw
        request.attempt += 1
        request.classes = -1
        self.open = True
        self.answers, self.rows, self.taken = [], [], 0
        self.pending = self.job.participants

    def take(self, rows: Ints, answers: Floats) -> None:
        """Record devices assigned to the current attempt."""
        count = len(rows)
        if not count:
            return
        self.rows.append(rows)
        self.answers.append(answers)
        self.taken += count
        self.result.assigned += count
        self.result.failed += int(np.count_nonzero(np.isinf(answers)))

    def device_returned(self, now_s: float, answered: bool) -> bool:
        """Count a device of a buffered job; True when the job is finished by it.

        The device is replaced: the cumulative demand ``pending`` grows by one.
        """
        request, result = self.request, self.result
        if self.pending == self.taken:
            request.opened_s = now_s
        self.pending += 1
        if not answered:
            return False
        result.answered += 1
        self.collected += 1
        if self.collected % self.job.buffer == 0:
            result.rounds_done += 1
            request.rounds_done += 1
            result.closes_s.append(now_s)
            result.opens_s.append(request.opened_s)
        if result.rounds_done < self.job.rounds:
            return False
        self.open = False
        request.remaining = 0
        result.finish_s = now_s
        return True

    def answered_by(self, now_s: float) -> int:
        """Answers of the current attempt that are in at ``now_s``."""
        return sum(int(np.count_nonzero(answers <= now_s)) for answers in self.answers)

    def end_attempt(self, now_s: float, success: bool, trace: Trace) -> None:
        """Close the attempt and book its devices."""
        request, result = self.request, self.result
        self.open = False
        self.again = not success
        request.remaining = 0
        answered = self.answered_by(now_s)
        finite = sum(int(np.count_nonzero(np.isfinite(answers))) for answers in self.answers)
        result.late += finite - answered
        if not success:
            result.aborted += 1
            return
        result.answered += answered
        result.rounds_done += 1
        request.rounds_done += 1
        result.opens_s.append(self.attempt_s)
        result.closes_s.append(now_s)
        dispatched_s = trace.time_of(int(np.concatenate(self.rows)[self.needed - 1]))
        result.queueing_s += dispatched_s - self.attempt_s
        result.response_s += now_s - dispatched_s
        if result.rounds_done == self.job.rounds:
            result.finish_s = now_s


def draw_priority(seed: int, job: int, attempt: int) -> float:
    """Uniform draw of one request, independent of the order of events."""
    return float(np.random.default_rng((seed, 1, job, attempt)).random())
