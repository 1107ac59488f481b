"""Live view of a Venn service: jobs, groups, supply and waits."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.table import Table

from actors.venn.client import JobClient
from actors.venn.security import SecurityConfig
from jobs.launcher import Job, JobContext, Summary
from raysys.config import check_range


@dataclass(frozen=True, kw_only=True, slots=True)
class TopConfig:
    """What to watch.

    Args:
        scheduler: address of the job plane.
        interval_s: between refreshes; updates: stop after so many, 0 goes on until Ctrl-C.
        rows: most jobs shown, longest wait first.
    """

    scheduler: str = "127.0.0.1:7700"
    interval_s: float = 1.0
    updates: int = 0
    rows: int = 25
    security: SecurityConfig = field(default_factory=SecurityConfig)

    def __post_init__(self) -> None:
        check_range(self, "interval_s", 0, low_open=True)
        check_range(self, "updates", 0)
        check_range(self, "rows", 1)


def run(config: TopConfig, context: JobContext) -> Summary:
    """Refresh until the wanted number of updates, then print the last view's totals."""
    last = asyncio.run(_watch(config, context))
    waiting = sum(job["remaining"] > 0 for job in last["jobs"])
    return Summary(lines=[f"{len(last['jobs'])} jobs, {waiting} waiting for devices"])


async def _watch(config: TopConfig, context: JobContext) -> dict[str, Any]:
    done = 0
    async with JobClient(config.scheduler, "top", config.security) as client:
        with Live(console=context.console, auto_refresh=False) as live:
            while True:
                overview: dict[str, Any] = await client.overview()
                live.update(view(overview, config.rows), refresh=True)
                done += 1
                if config.updates and done >= config.updates:
                    return overview
                await asyncio.sleep(config.interval_s)


def view(overview: dict[str, Any], rows: int) -> Group:
    """Tables of one moment."""
    head = (
        f"epoch {overview['epoch']}, plan {overview['version']}, "
        f"{len(overview['gateways'])} gateways, {overview['checkins']:,} check-ins, "
        f"{overview['merged_atoms']} rare atoms folded"
    )
    groups = Table(title="groups")
    for name in ("requirement", "devices/s", "jobs", "waiting", "devices wanted"):
        groups.add_column(name)
    for index, group in enumerate(overview["groups"]):
        members = [job for job in overview["jobs"] if job["group"] == index]
        bounds = ", ".join(f"{key}>={value:g}" for key, value in group["requirement"].items())
        waiting = [job for job in members if job["remaining"]]
        wanted = sum(job["remaining"] for job in waiting)
        cells = (bounds or "any", f"{group['rate']:.3g}", len(members), len(waiting), wanted)
        groups.add_row(*map(str, cells))
    jobs = Table(title="jobs, longest wait first")
    for name in ("job", "group", "rounds", "aborted", "demand", "remaining", "waits s"):
        jobs.add_column(name)
    ordered = sorted(overview["jobs"], key=lambda job: -job["wait_s"] * bool(job["remaining"]))
    for job in ordered[:rows]:
        keys = ("job", "group", "rounds_done", "aborted", "demand", "remaining")
        jobs.add_row(*(str(job[key]) for key in keys), f"{job['wait_s']:.0f}")
    return Group(head, groups, jobs)


JOB = Job(name="venn top", config=TopConfig, run=run)
