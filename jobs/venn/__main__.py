"""Share one population of devices between many federated jobs (serve, load, top, simulate).

raysys venn serve [--set cluster.gateways=4]      the service on Ray, until Ctrl-C
raysys venn load --set scheduler=HOST:PORT ...    put load on a running service and check it
raysys venn top  --set scheduler=HOST:PORT        live view of jobs, groups, supply and waits
raysys venn token --set role=job ...              issue an enrolment token
raysys venn simulate [--set tiers=2]              workloads under several schedulers, a report
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from jobs.launcher import Job, main
from jobs.venn import load, serve, simulate, token, top

COMMANDS: dict[str, Job[Any]] = {
    "serve": serve.JOB,
    "load": load.JOB,
    "top": top.JOB,
    "token": token.JOB,
    "simulate": simulate.JOB,
}


def run(arguments: Sequence[str] | None = None) -> int:
    """Hand over to the command named first; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in {"-h", "--help"}:
        print(__doc__)
        return 0 if words else 2
    if words[0] not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"raysys: error: venn: unknown command {words[0]!r}; one of {known}", file=sys.stderr)
        return 2
    return main(COMMANDS[words[0]], words[1:])


if __name__ == "__main__":
    raise SystemExit(run())
