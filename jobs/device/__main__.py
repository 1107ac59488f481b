"""Train on this device for federated jobs that Venn grants (join, simulate, serve, certificates).

raysys device join --server HOST:PORT             this device takes part until Ctrl-C
raysys device simulate --server HOST:PORT --count N   many modelled devices
raysys device serve [--set rounds=50]             plans, models and updates of a federated job
raysys device certificates --set folder=DIR       an authority and certificates for mutual TLS
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from jobs.device import certificates, join, serve, simulate
from jobs.launcher import Job, main

COMMANDS: dict[str, Job[Any]] = {
    "join": join.JOB,
    "simulate": simulate.JOB,
    "serve": serve.JOB,
    "certificates": certificates.JOB,
}


def run(arguments: Sequence[str] | None = None) -> int:
    """Hand over to the command named first; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in {"-h", "--help"}:
        print(__doc__)
        return 0 if words else 2
    if words[0] not in COMMANDS:
        known = ", ".join(COMMANDS)
        text = f"raysys: error: device: unknown command {words[0]!r}; one of {known}"
        print(text, file=sys.stderr)
        return 2
    return main(COMMANDS[words[0]], words[1:])


if __name__ == "__main__":
    raise SystemExit(run())
