"""Run many modelled devices of five phone models against a running edge service."""

from __future__ import annotations

import asyncio
import dataclasses

from actors.edge.simulated import FleetReport, SimulateConfig, SimulatedFleet
from jobs.launcher import Job, JobContext, Summary


def run(config: SimulateConfig, context: JobContext) -> Summary:
    """Enrol the fleet, let it work, report; exit code 1 if no update was taken."""
    report = asyncio.run(SimulatedFleet(config).run())
    context.run.write_json("fleet.json", dataclasses.asdict(report))
    return Summary(lines=describe(report), exit_code=int(report.accepted == 0))


def describe(report: FleetReport) -> list[str]:
    """The report in words."""
    lines = [
        f"{report.enrolled:,} of {report.devices:,} devices, {report.checkins:,} check-ins",
        f"{report.leases:,} leases, {report.accepted:,} of {report.updates:,} updates accepted, "
        f"{report.failed} failed, in {report.seconds:.1f} s",
        f"SoC model: {report.modelled_s:,.0f} device-seconds, {report.modelled_j:,.0f} J",
    ]
    common = sorted(report.errors.items(), key=lambda pair: -pair[1])[:3]
    return lines + [f"{count} times: {text}" for text, count in common]


JOB = Job(name="device simulate", config=SimulateConfig, run=run, flags=("server", "code", "count"))
