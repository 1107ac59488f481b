"""Select a coreset that covers the data: `score` a data set, `select` a part, `report` on it.

    raysys coreset score  --set data.name=fashion-mnist --run-dir runs/scores
    raysys coreset select --set scores=[runs/scores/scores.parquet] --set alpha=0.9
    raysys coreset report --set coreset=runs/.../coreset --set scores=runs/scores/scores.parquet

Each command takes --config FILE, --set a.b=VALUE and --run-dir; --help lists its fields.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs.coreset.report import JOB as REPORT
from jobs.coreset.score import JOB as SCORE
from jobs.coreset.select import JOB as SELECT
from jobs.launcher import Job, main

COMMANDS: dict[str, Job] = {"score": SCORE, "select": SELECT, "report": REPORT}


def command_line(arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands; without one, or with ``--help``, print what there is."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in COMMANDS:
        return main(COMMANDS[given[0]], given[1:])
    if given and given[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    found = repr(given[0]) if given else "nothing"
    print(
        f"raysys: error: COMMAND: expected one of {', '.join(COMMANDS)}, got {found}. "
        "See raysys coreset --help",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    raise SystemExit(command_line())
