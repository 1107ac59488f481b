"""Tour stage: four workloads under four schedulers, then the live service for a few seconds."""

from __future__ import annotations

from actors.venn.load import LoadConfig, LoadReport, run_load
from actors.venn.processes import deployment
from jobs.tour.stage import Row, Stage, StageContext, StageResult
from jobs.venn.plots import DAY_S, completion_plot, demand_plot, wait_plot
from raysys import machine, scratch
from raysys.federated.venn import baselines
from raysys.federated.venn.irs import IRS, IRSConfig
from raysys.federated.venn.requests import Policy
from raysys.federated.venn.simulator import SimResult, Trace, simulate
from raysys.federated.venn.simulator.loaders import generated_trace, load_trace
from raysys.federated.venn.simulator.workloads import WorkloadConfig, make_workload

WORKLOADS = ("even", "small", "low", "general")


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
            scale_rounds=80 if context.smoke else 40,
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
        scratch.folder("venn") as folder,
        deployment(folder, gateways=1, standby=False) as running,
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
    name, outcomes = next(iter(results.items()))
    plots = [
        completion_plot(name, outcomes),
        demand_plot(name, "Venn", outcomes["Venn"], trace),
        wait_plot(name, outcomes),
    ]
    return StageResult(rows=rows, plots=plots, notes=notes)


STAGE = Stage(
    name="venn",
    title="Venn: many federated jobs, one population of devices",
    problem="Dozens of federated jobs want the same phones. Which job gets a phone that checks in, "
    "so that all of them finish soon and jobs with rare requirements do not starve?",
    command="raysys venn serve",
    run=run,
)
