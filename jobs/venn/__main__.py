"""Share one population of devices between many federated jobs (serve, load, top, simulate).

raysys venn serve [--set cluster.gateways=4]      the service on Ray, until Ctrl-C
raysys venn load --set scheduler=HOST:PORT ...    put load on a running service and check it
raysys venn top  --set scheduler=HOST:PORT        live view of jobs, groups, supply and waits
raysys venn token --set role=job ...              issue an enrolment token
raysys venn simulate [--set tiers=2]              workloads under several schedulers, a report
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jobs.commands import run_command
from jobs.launcher import Job
from jobs.venn import load, serve, simulate, token, top

COMMANDS: dict[str, Job[Any]] = {
    "serve": serve.JOB,
    "load": load.JOB,
    "top": top.JOB,
    "token": token.JOB,
    "simulate": simulate.JOB,
}


def command_line(arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands; returns the exit code."""
    return run_command("venn", __doc__, COMMANDS, arguments)


if __name__ == "__main__":
    raise SystemExit(command_line())
