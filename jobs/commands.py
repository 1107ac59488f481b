"""Jobs that share a name: ``raysys NAME COMMAND`` hands over to one of them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.launcher import Job, main


def run_command(
    name: str, about: str | None, commands: Mapping[str, Job[Any]], arguments: Sequence[str] | None
) -> int:
    """Run the job that the first argument names; ``--help`` prints what there is.

    Args:
        name: of the family, as the user types it after ``raysys``.
        about: its help, usually the module's docstring.
        arguments: the command line after the family's name; None takes the process's.

    Returns:
        The exit code; 2 without a known command.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in commands:
        return main(commands[given[0]], given[1:])
    if given and given[0] in ("-h", "--help"):
        print(about)
        return 0
    found = repr(given[0]) if given else "nothing"
    print(
        f"raysys: error: COMMAND: expected one of {', '.join(commands)}, got {found}. "
        f"See raysys {name} --help",
        file=sys.stderr,
    )
    return 2
