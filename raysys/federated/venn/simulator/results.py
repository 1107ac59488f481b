"""What a simulation reports, by job and in sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from raysys.errors import InfeasibleError


@dataclass(slots=True)
class JobResult:
    """Outcome of one job; times in seconds.

    Args:
        job: index; group: its requirement; demand: participants times rounds.
        arrival_s, finish_s: registration and end; ``finish_s`` is infinite if it did not finish.
        rounds_done, aborted: finished rounds and failed attempts.
        queueing_s: summed time from opening to the assignment of the share that must answer.
        response_s: summed time from there to the end of the round.
        assigned, answered, failed: devices given, answers in time, devices that went offline first.
        late: answers that came after their attempt was over.
        closes_s: end of every finished round; opens_s: opening of its successful attempt.
    """

    job: int
    group: int
    demand: int
    arrival_s: float
    finish_s: float = float("inf")
    rounds_done: int = 0
    aborted: int = 0
    queueing_s: float = 0.0
    response_s: float = 0.0
    assigned: int = 0
    answered: int = 0
    failed: int = 0
    late: int = 0
    closes_s: list[float] = field(default_factory=list)
    opens_s: list[float] = field(default_factory=list)

    @property
    def jct_s(self) -> float:
        """Job completion time."""
        return self.finish_s - self.arrival_s


@dataclass(slots=True)
class SimResult:
    """Outcome of a run."""

    jobs: list[JobResult]
    events: int = 0
    checkins: int = 0

    @property
    def finished(self) -> bool:
        return all(np.isfinite(job.finish_s) for job in self.jobs)

    def mean_jct_s(self) -> float:
        """Mean completion time over all jobs.

        Raises:
            InfeasibleError: some job did not finish, so the mean would flatter the scheduler.
        """
        missing = sum(not np.isfinite(job.finish_s) for job in self.jobs)
        if missing:
            reason = f"{missing} of {len(self.jobs)} jobs did not finish"
            raise InfeasibleError("mean completion time", reason, "Raise SimConfig.repeats")
        return float(np.mean([job.jct_s for job in self.jobs]))

    def makespan_s(self) -> float:
        return max(job.finish_s for job in self.jobs) - min(job.arrival_s for job in self.jobs)

    def mean_queueing_s(self) -> float:
        """Mean over finished rounds."""
        rounds = sum(job.rounds_done for job in self.jobs)
        return sum(job.queueing_s for job in self.jobs) / max(rounds, 1)

    def mean_response_s(self) -> float:
        """Mean over finished rounds."""
        rounds = sum(job.rounds_done for job in self.jobs)
        return sum(job.response_s for job in self.jobs) / max(rounds, 1)

    def wasted_share(self) -> float:
        """Share of the assigned devices whose work was not used."""
        assigned = sum(job.assigned for job in self.jobs)
        return 1.0 - sum(job.answered for job in self.jobs) / max(assigned, 1)


def speedup(baseline: SimResult, ours: SimResult) -> float:
    """Ratio of mean completion times."""
    return baseline.mean_jct_s() / ours.mean_jct_s()


def speedup_by_class(baseline: SimResult, ours: SimResult, groups: int) -> list[float]:
    """Ratio of mean completion times of the jobs of each group; NaN for a group without jobs."""
    return [
        _ratio(baseline, ours, [job.job for job in ours.jobs if job.group == group])
        for group in range(groups)
    ]


def speedup_of_smallest(baseline: SimResult, ours: SimResult, share: float) -> float:
    """Ratio over the ``share`` of jobs with the lowest total demand (paper, table 2)."""
    order = sorted(ours.jobs, key=lambda job: (job.demand, job.job))
    count = max(round(share * len(order)), 1)
    return _ratio(baseline, ours, [job.job for job in order[:count]])


def _ratio(baseline: SimResult, ours: SimResult, members: Sequence[int]) -> float:
    if not members:
        return float("nan")
    before = float(np.mean([baseline.jobs[job].jct_s for job in members]))
    return before / float(np.mean([ours.jobs[job].jct_s for job in members]))
