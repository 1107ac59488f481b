"""What both simulators share: clock-free facts about devices, supply and the policy's plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raysys.errors import ConfigError, InfeasibleError
from raysys.federated.venn.requests import Plan, Policy, Request
from raysys.federated.venn.simulator.jobs import SimConfig, SimJob
from raysys.federated.venn.simulator.results import SimResult
from raysys.federated.venn.simulator.rounds import Run
from raysys.federated.venn.simulator.trace import Floats, Ints, Trace, hash_uniform
from raysys.federated.venn.supply import SupplyView


@dataclass(eq=False, slots=True)
class World:
    """Trace, jobs and policy of one run, and the plan in force."""

    trace: Trace
    config: SimConfig
    policy: Policy
    runs: list[Run]
    waiting: dict[int, Request] = field(default_factory=dict)
    unfinished: int = 0
    events: int = 0
    _supply: SupplyView | None = None
    _supply_at_s: float = 0.0
    _groups: int = 0
    _observer: Any = None
    _work: dict[tuple[float, float], Floats] = field(default_factory=dict)

    @classmethod
    def of(cls, trace: Trace, jobs: Sequence[SimJob], policy: Policy, config: SimConfig) -> World:
        """Check that every job can be served at all and build the run's state.

        Raises:
            ConfigError: there are no jobs.
            InfeasibleError: no device of the trace is eligible for a job's group.
        """
        if not jobs:
            raise ConfigError("jobs", 0, "at least one job")
        for index, job in enumerate(jobs):
            if not any(mask >> job.group & 1 for mask in trace.masks):
                raise InfeasibleError(f"job {index}", f"no device is eligible for {job.group}")
        runs = [Run.of(index, job, config) for index, job in enumerate(jobs)]
        world = cls(trace, config, policy, runs, unfinished=len(runs))
        world._groups = max(trace.groups, max(job.group for job in jobs) + 1)
        world._observer = getattr(policy, "round_closed", None)
        return world

    @property
    def horizon_s(self) -> float:
        """The simulation stops here."""
        return self.config.repeats * self.trace.period_s

    def supply(self, now_s: float) -> SupplyView:
        """Rates over the window, taken anew every ``supply_refresh_s`` at the next job event."""
        if self._supply is None or now_s >= self._supply_at_s + self.config.supply_refresh_s:
            rates = self.trace.rates_at(now_s, self.config.supply_window_s)
            self._supply = SupplyView.build(self.trace.masks, rates, self._groups)
            self._supply_at_s = now_s
        return self._supply

    def plan(self, now_s: float) -> Plan:
        return self.policy.plan(list(self.waiting.values()), self.supply(now_s), now_s)

    def answer_times(self, job: SimJob, positions: Ints) -> Floats:
        """When the devices at these virtual positions answer; infinite if they go offline first.

        A device starts up to ``delay_s`` after its check-in, needs ``work * compute + 2 * comm *
        transfer`` seconds, and fails silently if that passes the end of its online time.
        """
        periods, rows = np.divmod(positions, len(self.trace))
        starts = self.trace.start[rows] + periods * self.trace.period_s
        offset = self._task_s(job)[rows]
        if self.config.delay_s:
            offset = offset + self.config.delay_s * hash_uniform(positions, self.config.seed)
        answers: Floats = np.where(offset <= self.trace.online[rows], starts + offset, np.inf)
        return answers

    def offline_times(self, positions: Ints) -> Floats:
        """When the devices at these virtual positions go offline."""
        periods, rows = np.divmod(positions, len(self.trace))
        end: Floats = self.trace.start[rows] + periods * self.trace.period_s
        end += self.trace.online[rows]
        return end

    def closed(self, run: Run, now_s: float, success: bool) -> None:
        """Book the end of an attempt and tell a policy that learns from rounds."""
        if self._observer is not None and success and run.rows:
            positions = np.concatenate(run.rows)
            periods, rows = np.divmod(positions, len(self.trace))
            starts = self.trace.start[rows] + periods * self.trace.period_s
            response = np.concatenate(run.answers) - starts
            fill_s = float(starts[-1]) - run.attempt_s
            self._observer(run.request, fill_s, self.trace.capability[rows], response)
        run.end_attempt(now_s, success, self.trace)
        self.waiting.pop(run.index, None)
        if run.result.finish_s == now_s:
            self.unfinished -= 1

    def result(self, checkins: int) -> SimResult:
        return SimResult([run.result for run in self.runs], self.events, checkins)

    def _task_s(self, job: SimJob) -> Floats:
        key = (job.work_s, job.comm_s)
        if key not in self._work:
            task = job.work_s * self.trace.compute + 2 * job.comm_s * self.trace.comm
            self._work[key] = task
        return self._work[key]
