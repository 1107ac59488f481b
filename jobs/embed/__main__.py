"""Train click models on embedding rows of fitting lengths: `train`, `export`, `serve`.

    raysys embed train  --data clicks.parquet
    raysys embed export --run runs/embed-train-... --set out=model
    raysys embed serve  --model model

Each command takes --config FILE, --set a.b=VALUE and --run-dir; --help lists its fields.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs.embed.export import JOB as EXPORT
from jobs.embed.serve import JOB as SERVE
from jobs.embed.train import JOB as TRAIN
from jobs.launcher import Job, main

COMMANDS: dict[str, Job] = {"train": TRAIN, "export": EXPORT, "serve": SERVE}


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
        "See raysys embed --help",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    raise SystemExit(command_line())
