"""Venn's live claims: throughput over gRPC, live against simulated, recovery after SIGKILL."""

from __future__ import annotations

import asyncio
import os
import statistics
from pathlib import Path

import numpy as np

from actors.venn.chaos import Chaos, ChaosConfig
from actors.venn.load import LoadConfig, run_load
from actors.venn.processes import ProcessDeployment, deployment
from actors.venn.twin import Twin
from raysys import machine, scratch
from raysys.bench import Baseline, Claim, Profile
from raysys.federated.venn.irs import IRS, IRSConfig
from raysys.federated.venn.scheduler_state import ServiceConfig
from raysys.federated.venn.simulator import simulate
from raysys.federated.venn.simulator.loaders import generated_trace, load_trace
from raysys.federated.venn.simulator.workloads import WorkloadConfig, make_workload

TARGET_PER_S = 105_000.0
TWIN_DEVICES = 2000
SPEED = 60.0
DAY_S = 86_400.0
# The service's own time constants shrink with the clock: at 60:1, 20 ms are 1.2 s.
COMPRESSED = ServiceConfig(debounce_s=0.02 / SPEED, report_interval_s=0.02, replan_interval_s=1.0)


def checkins_per_second_grpc(profile: Profile) -> Claim:
    """Batched check-ins from client processes of their own, paced a little above 100,000/s."""
    load = LoadConfig(
        duration_s=profile.pick(10.0, 60.0), rate_per_s=TARGET_PER_S, processes=2, batch=1000
    )
    with scratch.folder("venn") as folder, deployment(folder, gateways=1) as running:
        before_s = _cpu_s(running)
        report = run_load(running.scheduler_address, running.gateway_addresses, load)
        cpu_s = _cpu_s(running) - before_s
    return Claim(
        name="checkins_per_second_grpc",
        value=report.rate_per_s,
        unit="check-ins/s",
        better="higher",
        samples={
            "target_per_s": TARGET_PER_S,
            "batch": load.batch,
            "seconds": report.seconds,
            "latency_p50_ms": report.latency_ms(0.5),
            "latency_p99_ms": report.latency_ms(0.99),
            "assigned": report.assigned,
            "rounds": report.rounds,
            "over_assigned": report.over_assigned,
            "ineligible": report.ineligible,
            "duplicates": report.duplicates,
            "failed_calls": report.errors,
            "gateway_cpu_s": cpu_s,
        },
    )


def unary_checkins_per_cpu_second(profile: Profile) -> Claim:
    """One device per call: what a server core manages, next to batches of 1,000."""
    rates = {}
    for batch in (1, 1000):
        load = LoadConfig(
            duration_s=profile.pick(3.0, 15.0), processes=1, batch=batch, in_flight=16, jobs=4
        )
        with (
            scratch.folder("venn") as folder,
            deployment(folder, gateways=1, standby=False) as running,
        ):
            before_s = _cpu_s(running)
            report = run_load(running.scheduler_address, running.gateway_addresses, load)
            share = report.seconds / (report.seconds + load.warm_up_s)
            rates[batch] = report.checkins / ((_cpu_s(running) - before_s) * share)
    return Claim(
        name="unary_checkins_per_cpu_second",
        value=rates[1],
        unit="check-ins per gateway CPU-second",
        better="higher",
        baseline=Baseline(name="batches of 1,000", value=rates[1000]),
        ratio=rates[1] / rates[1000],
    )


def live_vs_simulated(profile: Profile) -> Claim:
    """20 jobs and the check-ins of 2,000 devices at 60:1 over gRPC, against the simulator."""
    folder_of_data = machine.data_dir()
    trace = load_trace(folder_of_data, TWIN_DEVICES) if folder_of_data else generated_trace(29_600)
    rounds = profile.pick(1600.0, 400.0)
    workload = make_workload(
        WorkloadConfig(jobs=20, scale_devices=100, scale_rounds=rounds, seed=10)
    )
    policy = IRS(IRSConfig(demand_scope="total", yield_factor=2.0))
    expected = simulate(trace, workload.jobs, policy, workload.config())
    with (
        scratch.folder("venn") as folder,
        deployment(folder, gateways=1, standby=False, service=COMPRESSED) as running,
    ):
        address = running.gateway_addresses[0]
        twin = Twin(
            trace, workload.jobs, workload.config(), running.scheduler_address, address, SPEED
        )
        twin.warm_s = DAY_S
        live_s = asyncio.run(twin.run(limit_s=900))
    ours, theirs = float(np.mean(live_s)), expected.mean_jct_s()
    return Claim(
        name="live_vs_simulated",
        value=ours,
        unit="s of simulated time, mean completion",
        better="lower",
        baseline=Baseline(name="simulator", value=theirs),
        ratio=ours / theirs,
        samples={
            "live_s": live_s,
            "simulated_s": [job.jct_s for job in expected.jobs],
            "assigned": twin.assigned,
            "over_assigned": twin.over_assigned,
        },
        seeds=[10],
    )


def recovery_after_kill_s(profile: Profile) -> Claim:
    """SIGKILL of gateways, the leader, or both under load, with 1,000 jobs."""
    config = ChaosConfig(kills=profile.pick(3, 100))
    with scratch.folder("venn") as folder, deployment(folder, gateways=2) as running:
        report = asyncio.run(Chaos(running, config).run())
    return Claim(
        name="recovery_after_kill_s",
        value=max(report.recovery_s, default=0.0),
        unit="s, the longest recovery of a leader",
        better="lower",
        samples={
            "kills": dict(report.kills),
            "median_s": statistics.median(report.recovery_s) if report.recovery_s else None,
            "recovery_s": report.recovery_s,
            "assigned": report.assigned,
            "over_assigned": report.over_assigned,
            "most_live_leases_of_a_round": report.most_live,
            "longest_gap_s": report.longest_gap_s,
            "least_refilled": report.least_refilled,
            "demand": config.demand,
            "jobs_before": config.jobs,
            "jobs_after": report.jobs_after,
        },
        seeds=[config.seed],
    )


def _cpu_s(running: ProcessDeployment) -> float:
    """CPU seconds of the gateways so far."""
    total = 0.0
    for server in running.gateways:
        assert server.process is not None
        stat = Path(f"/proc/{server.process.pid}/stat").read_text(encoding="ascii")
        user, system = stat.rpartition(")")[2].split()[11:13]
        total += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return total
