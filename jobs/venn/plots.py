"""Plots of simulated workloads, for the tour and the report of ``raysys venn simulate``."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from raysys.federated.venn.simulator import SimResult, Trace
from raysys.report import Plot, new_figure

DAY_S = 86_400.0
HOUR_S = 3600.0
WAIT_SLOTS = 30


def completion_plot(name: str, outcomes: Mapping[str, SimResult]) -> Plot:
    """Distribution of completion times, a curve per policy."""
    figure, axes = new_figure()
    for label, result in outcomes.items():
        days = np.sort([job.jct_s / DAY_S for job in result.jobs])
        axes.step(days, np.arange(1, len(days) + 1) / len(days), where="post", label=label)
    axes.set_xlabel("completion time (simulated days)")
    axes.set_ylabel("share of jobs")
    axes.legend()
    caption = f"{name} workload; a curve further to the left is better"
    return Plot(title="Job completion times", caption=caption, figure=figure)


def demand_plot(name: str, label: str, ours: SimResult, trace: Trace) -> Plot:
    """Devices that checked in and devices asked for, by hour."""
    end_s = max(job.finish_s for job in ours.jobs)
    edges = np.arange(0, end_s + HOUR_S, HOUR_S)
    supplied = np.diff([trace.position_at(float(edge)) for edge in edges])
    demanded = np.zeros(len(edges) - 1)
    for job in ours.jobs:
        sizes = np.full(len(job.opens_s), job.demand / max(len(job.opens_s), 1))
        demanded += np.histogram(job.opens_s, bins=edges, weights=sizes)[0]
    figure, axes = new_figure()
    axes.plot(edges[:-1] / DAY_S, supplied, label="devices that checked in")
    axes.plot(edges[:-1] / DAY_S, demanded, label="devices asked for in finished rounds")
    axes.set_xlabel("simulated days")
    axes.set_ylabel("devices per hour")
    axes.legend()
    caption = f"{name} workload under {label}; the trace has a daily rhythm"
    return Plot(title="Supply and demand", caption=caption, figure=figure)


def wait_plot(name: str, outcomes: Mapping[str, SimResult]) -> Plot:
    """How long rounds take over the simulated days, a curve per policy."""
    figure, axes = new_figure()
    last_s = max(job.opens_s[-1] for result in outcomes.values() for job in result.jobs)
    width_s = last_s / WAIT_SLOTS
    for label, result in outcomes.items():
        opened = np.concatenate([job.opens_s for job in result.jobs])
        lasted = np.concatenate([job.closes_s for job in result.jobs]) - opened
        slots = (opened // width_s).astype(int)
        counts = np.bincount(slots)
        means = np.bincount(slots, weights=lasted)[counts > 0] / counts[counts > 0]
        axes.plot(np.flatnonzero(counts) * width_s / DAY_S, means, label=label)
    axes.set_xlabel("simulated days")
    axes.set_ylabel("seconds per round")
    axes.legend()
    caption = (
        f"{name} workload; from opening to the last needed answer, mean over the successful rounds "
        f"opened in {width_s / HOUR_S:.1f} h"
    )
    return Plot(title="How long a round takes", caption=caption, figure=figure)
