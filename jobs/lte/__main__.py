"""Give a language model learned sparsity (convert, train, sweep, eval, bench, serve, inspect).

raysys lte convert --set model=DENSE --set out=LTE            group neurons, add routers
raysys lte train   --set model=LTE --set out=TRAINED ...      one stage on Ray Train, resumable
raysys lte sweep   --set model=LTE --set 'etas=[0.1,0.3,1]'   one model per eta, Pareto table
raysys lte eval    --set model=TRAINED                        quality, sparsity, FLOPs, speed
raysys lte bench   --set hidden=576 --set neurons=1536        the FFN kernel on this machine
raysys lte serve   --set model=TRAINED                        OpenAI-compatible, through vLLM
raysys lte inspect --set model=TRAINED                        what a checkpoint holds
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from jobs.launcher import Job, main
from jobs.lte import bench, convert, evaluate, inspection, serve, sweep, train

COMMANDS: dict[str, Job[Any]] = {
    "convert": convert.JOB,
    "train": train.JOB,
    "sweep": sweep.JOB,
    "eval": evaluate.JOB,
    "bench": bench.JOB,
    "serve": serve.JOB,
    "inspect": inspection.JOB,
}


def run(arguments: Sequence[str] | None = None) -> int:
    """Hand over to the command named first; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in {"-h", "--help"}:
        print(__doc__)
        return 0 if words else 2
    if words[0] not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"raysys: error: lte: unknown command {words[0]!r}; one of {known}", file=sys.stderr)
        return 2
    return main(COMMANDS[words[0]], words[1:])


if __name__ == "__main__":
    raise SystemExit(run())
