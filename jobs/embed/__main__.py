"""Train click models on embedding rows of fitting lengths: `train`, `export`, `serve`.

    raysys embed train  --data clicks.parquet
    raysys embed export --run runs/embed-train-... --set out=model
    raysys embed serve  --model model

Each command takes --config FILE, --set a.b=VALUE and --run-dir; --help lists its fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jobs.commands import run_command
from jobs.embed.export import JOB as EXPORT
from jobs.embed.serve import JOB as SERVE
from jobs.embed.train import JOB as TRAIN
from jobs.launcher import Job

COMMANDS: dict[str, Job[Any]] = {"train": TRAIN, "export": EXPORT, "serve": SERVE}


def command_line(arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands; returns the exit code."""
    return run_command("embed", __doc__, COMMANDS, arguments)


if __name__ == "__main__":
    raise SystemExit(command_line())
