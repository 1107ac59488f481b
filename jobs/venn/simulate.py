"""Simulate workloads under several schedulers; tables and plots go into a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jobs.launcher import Job, JobContext, Summary
from jobs.venn.plots import DAY_S, completion_plot, demand_plot, wait_plot
from raysys import machine
from raysys.config import check, check_range
from raysys.federated.venn.requests import Policy
from raysys.federated.venn.scheduler import POLICIES
from raysys.federated.venn.simulator import SimResult, Trace, simulate
from raysys.federated.venn.simulator.loaders import generated_trace, load_trace
from raysys.federated.venn.simulator.results import speedup_by_class, speedup_of_smallest
from raysys.federated.venn.simulator.workloads import (
    GROUP_NAMES,
    Workload,
    WorkloadConfig,
    make_workload,
)
from raysys.federated.venn.tiers import TieredPolicy
from raysys.report import Cell, Section, Table, render_page

REPORT = "report.html"
Cells = list[str | Cell]
CLASSES = 12
SHARES = (0.25, 0.5, 0.75)


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulateConfig:
    """What to simulate.

    Args:
        workloads: names of the nine; policies: names of the service's policies, the first one is
            the base of the speed-ups.
        seed: of the draws; None takes the authors' seed of each workload.
        jobs, scale_devices, scale_rounds, buffered_share: see
            :class:`~raysys.federated.venn.simulator.workloads.WorkloadConfig`.
        trace: folder with device tables; empty takes the data folder, or generates a trace.
        devices: size of the population.
        eps: starvation knob; tiers: tiers of tier matching, 1 is off (both for IRS policies).
    """

    workloads: tuple[str, ...] = ("even",)
    policies: tuple[str, ...] = ("random", "fifo", "srsf", "irs-yield")
    seed: int | None = None
    jobs: int = 50
    scale_devices: float = 10.0
    scale_rounds: float = 20.0
    buffered_share: float = 0.0
    trace: str = ""
    devices: int = 10_775
    eps: float = 0.0
    tiers: int = 1

    def __post_init__(self) -> None:
        known = all(name in POLICIES for name in self.policies)
        check(self, "policies", known and len(self.policies) > 0, "some of " + ", ".join(POLICIES))
        check(self, "workloads", len(self.workloads) > 0, "at least one name")
        for name in self.workloads:
            self.workload(name)
        check_range(self, "devices", 1)
        check_range(self, "tiers", 1, CLASSES)
        check_range(self, "eps", 0, 100)

    def workload(self, name: str) -> Workload:
        """Draw the jobs of one workload."""
        return make_workload(
            WorkloadConfig(
                name=name,
                seed=self.seed,
                jobs=self.jobs,
                scale_devices=self.scale_devices,
                scale_rounds=self.scale_rounds,
                buffered_share=self.buffered_share,
            )
        )


def run(config: SimulateConfig, context: JobContext) -> Summary:
    """Run every policy on every workload; per-job rows go into the table ``jobs``."""
    trace = _trace(config)
    results: dict[str, dict[str, SimResult]] = {}
    steps = len(config.workloads) * len(config.policies)
    with context.progress("simulations", total=steps) as advance:
        for name in config.workloads:
            workload = config.workload(name)
            results[name] = {}
            for label in config.policies:
                policy = _policy(label, config, workload)
                result = simulate(trace, workload.jobs, policy, workload.config())
                results[name][label] = result
                context.run.append_rows("jobs", _rows(name, label, result))
                advance(1)
    base, ours = config.policies[0], config.policies[-1]
    sections = [_section(name, outcomes, trace) for name, outcomes in results.items()]
    lines = [
        f"{name}: {ours} {found[base].mean_jct_s() / found[ours].mean_jct_s():.2f} times as fast"
        f" as {base}, mean completion {found[ours].mean_jct_s() / DAY_S:.2f} days"
        for name, found in results.items()
    ]
    context.run.write_json("result.json", {name: _plain(found) for name, found in results.items()})
    page = render_page("Venn: simulated workloads", " ".join(lines), sections)
    context.run.storage.write(REPORT, page.encode())
    return Summary(lines=lines, report=REPORT)


def _trace(config: SimulateConfig) -> Trace:
    folder = Path(config.trace) if config.trace else machine.data_dir()
    if folder is None:
        trace = generated_trace(15 * config.devices)
    else:
        trace = load_trace(folder, config.devices)
    return trace.with_speed_classes(CLASSES) if config.tiers > 1 else trace


def _policy(label: str, config: SimulateConfig, workload: Workload) -> Policy:
    policy = POLICIES[label](config.eps)
    if config.tiers == 1 or not label.startswith("irs"):
        return policy
    deadlines = [job.deadline_s for job in workload.jobs]
    return TieredPolicy.of(policy, config.tiers, CLASSES, workload.seed, deadlines)


def _rows(name: str, label: str, result: SimResult) -> list[dict[str, Any]]:
    return [
        {
            "workload": name,
            "policy": label,
            "job": job.job,
            "class": GROUP_NAMES[job.group],
            "demand": job.demand,
            "arrival_s": job.arrival_s,
            "completion_s": job.jct_s,
            "rounds": job.rounds_done,
            "aborted": job.aborted,
            "queueing_s": job.queueing_s,
            "response_s": job.response_s,
            "assigned": job.assigned,
            "answered": job.answered,
            "failed": job.failed,
            "late": job.late,
        }
        for job in result.jobs
    ]


# Heading -> digits shown, value
_MEASURES: dict[str, tuple[int, Callable[[SimResult], float]]] = {
    "completion, days": (2, lambda result: result.mean_jct_s() / DAY_S),
    "makespan, days": (2, lambda result: result.makespan_s() / DAY_S),
    "filling, s": (0, SimResult.mean_queueing_s),
    "answers, s": (0, SimResult.mean_response_s),
    "aborted": (0, lambda result: float(sum(job.aborted for job in result.jobs))),
    "wasted, %": (0, lambda result: 100 * result.wasted_share()),
}


def _section(name: str, outcomes: Mapping[str, SimResult], trace: Trace) -> Section:
    base = next(iter(outcomes.values()))
    ours_label, ours = list(outcomes.items())[-1]
    rows: list[Cells] = [
        [
            label,
            _number(base.mean_jct_s() / result.mean_jct_s(), 2),
            *(_number(measure(result), digits) for digits, measure in _MEASURES.values()),
        ]
        for label, result in outcomes.items()
    ]
    groups: list[Cells] = [
        [label, *(_number(value, 2) for value in speedup_by_class(base, result, len(GROUP_NAMES)))]
        for label, result in outcomes.items()
    ]
    smallest: list[Cells] = [
        [label, *(_number(speedup_of_smallest(base, result, share), 2) for share in SHARES)]
        for label, result in outcomes.items()
    ]
    first = next(iter(outcomes))
    return Section(
        title=f"Workload {name}",
        lead=f"{len(base.jobs)} jobs; speed-ups are of the mean completion time over {first}.",
        tables=[
            Table(
                headers=["policy", "speed-up", *_MEASURES],
                rows=rows,
                caption="Means over jobs, and over finished rounds for filling and answers",
            ),
            Table(
                headers=["policy", *GROUP_NAMES],
                rows=groups,
                caption="Speed-up by the device class that a job asks for",
            ),
            Table(
                headers=["policy", *(f"lowest {share:.0%}" for share in SHARES)],
                rows=smallest,
                caption="Speed-up of the jobs with the lowest total demand",
            ),
        ],
        plots=[
            completion_plot(name, outcomes),
            demand_plot(name, ours_label, ours, trace),
            wait_plot(name, outcomes),
        ],
    )


def _number(value: float, digits: int) -> Cell:
    return Cell(text="-" if math.isnan(value) else f"{value:,.{digits}f}", number=True)


def _plain(outcomes: Mapping[str, SimResult]) -> dict[str, Any]:
    return {
        label: {"mean_completion_s": result.mean_jct_s()}
        | {key: float(np.round(measure(result), 6)) for key, (_, measure) in _MEASURES.items()}
        for label, result in outcomes.items()
    }


JOB = Job(name="venn simulate", config=SimulateConfig, run=run)
