"""Select a coreset that covers the data: `score` a data set, `select` a part, `report` on it.

    raysys coreset score  --set data.name=fashion-mnist --run-dir runs/scores
    raysys coreset select --set scores=[runs/scores/scores.parquet] --set alpha=0.9
    raysys coreset report --set coreset=runs/.../coreset --set scores=runs/scores/scores.parquet

Each command takes --config FILE, --set a.b=VALUE and --run-dir; --help lists its fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jobs.commands import run_command
from jobs.coreset.report import JOB as REPORT
from jobs.coreset.score import JOB as SCORE
from jobs.coreset.select import JOB as SELECT
from jobs.launcher import Job

COMMANDS: dict[str, Job[Any]] = {"score": SCORE, "select": SELECT, "report": REPORT}


def command_line(arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands; returns the exit code."""
    return run_command("coreset", __doc__, COMMANDS, arguments)


if __name__ == "__main__":
    raise SystemExit(command_line())
