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

from collections.abc import Sequence
from typing import Any

from jobs.commands import run_command
from jobs.launcher import Job
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


def command_line(arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands; returns the exit code."""
    return run_command("lte", __doc__, COMMANDS, arguments)


if __name__ == "__main__":
    raise SystemExit(command_line())
