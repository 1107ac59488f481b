"""Train on this device, for federated jobs that Venn grants or for whoever may steer it.

raysys device join --server HOST:PORT             this device takes part until Ctrl-C
raysys device simulate --server HOST:PORT --count N   many modelled devices
raysys device serve [--set rounds=50]             plans, models and updates of a federated job
raysys device listen                              train what others send (service SwanDevice)
raysys device certificates --set folder=DIR       an authority and certificates for mutual TLS
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jobs.commands import run_command
from jobs.device import certificates, join, listen, serve, simulate
from jobs.launcher import Job

COMMANDS: dict[str, Job[Any]] = {
    "join": join.JOB,
    "simulate": simulate.JOB,
    "serve": serve.JOB,
    "listen": listen.JOB,
    "certificates": certificates.JOB,
}


def command_line(arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands; returns the exit code."""
    return run_command("device", __doc__, COMMANDS, arguments)


if __name__ == "__main__":
    raise SystemExit(command_line())
