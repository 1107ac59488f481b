"""Tour stage: four workloads under four schedulers, then the live service for a few seconds."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from actors.venn.load import LoadConfig, LoadReport, run_load
from actors.venn.processes import deployment
from jobs.tour.stage import Row, Stage, StageContext, StageResult
from raysys import machine
from raysys.federated.venn import baselines
from raysys.federated.venn.irs import IRS, IRSConfig
from raysys.federated.venn.requests import Policy
from raysys.federated.venn.simulator import SimResult, Trace, simulate
from raysys.federated.venn.simulator.loaders import generated_trace, load_trace
from raysys.federated.venn.simulator.workloads import WorkloadConfig, make_workload
from raysys.report import Plot, new_figure

WORKLOADS = ("even", "small", "low", "general")
DAY_S = 86_400.0
HOUR_S = 3600.0
WAIT_SLOTS = 30


def policies() -> dict[str, Policy]:
    """The schedulers of the stage, random first."""
    return {
        "random": baselines.random_per_request(),
        "FIFO": baselines.fifo(),
        "SRSF": baselines.srsf(),
        "Venn": IRS(IRSConfig(demand_scope="total", yield_factor=2.0)),
    }


def run(context: StageContext) -> StageResult:
    """Simulate every workload under every scheduler, then drive the service."""
    names = WORKLOADS[2:3] if context.smoke else WORKLOADS
    trace, source = _trace(context.smoke)
    steps = len(names) * len(policies()) + 1
    results: dict[str, dict[str, SimResult]] = {}
    done = 0
    for name in names:
        config = WorkloadConfig(
            name=name,
            jobs=12 if context.smoke else 50,
            scale_devices=40 if context.smoke else 10,
            scale_rounds=80 if context.smoke else 20,
        )
        workload = make_workload(config)
        results[name] = {}
        for label, policy in policies().items():
            context.progress(done, steps, f"{name}: {label}")
            results[name][label] = simulate(trace, workload.jobs, policy, workload.config())
            done += 1
    context.progress(done, steps, "live service")
    load = LoadConfig(
        duration_s=2.0 if context.smoke else 5.0,
        warm_up_s=0.5,
        processes=1,
        batch=500,
        rate_per_s=20_000,
        jobs=8,
        demand=200,
        seed=context.seed,
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        deployment(Path(folder), gateways=1, standby=False) as running,
    ):
        live = run_load(running.scheduler_address, running.gateway_addresses, load)
    context.progress(steps, steps, "done")
    return _result(results, live, trace, source)


def _trace(smoke: bool) -> tuple[Trace, str]:
    folder = machine.data_dir()
    devices = 2700 if smoke else 10_775
    if folder is not None:
        return load_trace(folder, devices), "FedScale-like (reconstructed) device trace"
    return generated_trace(40_000 if smoke else 159_000), "generated device trace"


def _result(
    results: dict[str, dict[str, SimResult]], live: LoadReport, trace: Trace, source: str
) -> StageResult:
    rows = []
    for name, outcomes in results.items():
        ours = outcomes["Venn"].mean_jct_s() / DAY_S
        rows += [
            Row(
                measure=f"mean job completion, {name} workload",
                unit="days",
                better="lower",
                baseline_name=label,
                baseline=outcomes[label].mean_jct_s() / DAY_S,
                ours=ours,
            )
            for label in ("random", "FIFO", "SRSF")
        ]
    rows.append(
        Row(
            measure="devices of live rounds beyond their demand, or ineligible",
            unit="devices",
            better="lower",
            baseline_name="specification",
            baseline=0.0,
            ours=float(live.over_assigned + live.ineligible + live.duplicates),
        )
    )
    jobs = len(next(iter(results.values()))["Venn"].jobs)
    notes = [
        f"{source}: {len(trace):,} check-ins per five days, {jobs} jobs per workload, simulated",
        f"live service over gRPC: {live.rate_per_s:,.0f} check-ins/s (paced), batch latency p99 "
        f"{live.latency_ms(0.99):.0f} ms, {live.assigned:,} devices in {live.rounds} rounds",
    ]
    plots = [_completion_plot(results), _demand_plot(results, trace), _wait_plot(results)]
    return StageResult(rows=rows, plots=plots, notes=notes)


def _completion_plot(results: dict[str, dict[str, SimResult]]) -> Plot:
    name, outcomes = next(iter(results.items()))
    figure, axes = new_figure()
    for label, result in outcomes.items():
        days = np.sort([job.jct_s / DAY_S for job in result.jobs])
        axes.step(days, np.arange(1, len(days) + 1) / len(days), where="post", label=label)
    axes.set_xlabel("completion time (simulated days)")
    axes.set_ylabel("share of jobs")
    axes.legend()
    caption = f"{name} workload; a curve further to the left is better"
    return Plot(title="Job completion times", caption=caption, figure=figure)


def _demand_plot(results: dict[str, dict[str, SimResult]], trace: Trace) -> Plot:
    name, outcomes = next(iter(results.items()))
    ours = outcomes["Venn"]
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
    caption = f"{name} workload under Venn; the trace has a daily rhythm"
    return Plot(title="Supply and demand", caption=caption, figure=figure)


def _wait_plot(results: dict[str, dict[str, SimResult]]) -> Plot:
    name, outcomes = next(iter(results.items()))
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


STAGE = Stage(
    name="venn",
    title="Venn: many federated jobs, one population of devices",
    problem="Dozens of federated jobs want the same phones. Which job gets a phone that checks in, "
    "so that all of them finish soon and jobs with rare requirements do not starve?",
    command="raysys venn serve",
    run=run,
)
