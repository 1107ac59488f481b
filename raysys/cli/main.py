"""Arguments of ``raysys`` and the start of a job as a process of its own."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence

from raysys import __version__, machine
from raysys.cli import doctor
from raysys.cli.catalogue import Entry, find_jobs
from raysys.errors import ConfigError, RaysysError

USAGE = """\
usage: raysys COMMAND [ARGUMENTS]

raysys runs ten ML systems on Ray: on this machine, or on a cluster with --address.

start here:
  raysys doctor              what works on this machine, and how to get the rest
  raysys tour                a real demonstration of every system, with a report (minutes)
  raysys COMMAND --help      arguments, configuration fields and defaults of a command

run:
  raysys run JOB ...         run a job; `raysys JOB ...` is the same
  raysys submit JOB ...      run a job on a cluster through the Ray Jobs API
  raysys list                the jobs, one a line
  raysys report RUN          write or find the HTML report of a run directory
  raysys bench SYSTEM        measure a system's claims against its baselines

jobs:
"""

CLOSING = """
every job takes:
  --config FILE              YAML configuration          --set a.b=VALUE   change one field
  --run-dir URI              where results go            --resume          go on with that run
  --address HOST:PORT        use a running Ray cluster (default: a private one, shut down after)

exit codes: 0 done, 1 failed, 2 wrong argument or configuration, 3 something is not installed,
4 impossible request, 5 cluster or peer failed, 6 file or disk, 130 interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns an exit code or replaces the process."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(words)
    except RaysysError as error:
        print(f"raysys: error: {error}", file=sys.stderr)
        return error.exit_code


def _dispatch(words: list[str]) -> int:
    jobs = find_jobs(machine.app_root())
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE + _lines(jobs) + CLOSING, end="")
        return 0
    command, rest = words[0], words[1:]
    if command == "--version":
        print(f"raysys {__version__}")
        return 0
    if command == "list":
        print(_lines(jobs), end="")
        return 0
    if command == "doctor":
        return doctor.main(rest)
    if command == "run":
        if not rest:
            raise ConfigError("JOB", None, _known(jobs))
        command, rest = rest[0], rest[1:]
    if command not in [job.name for job in jobs]:
        close = difflib.get_close_matches(command, [job.name for job in jobs], n=1)
        remedy = f"Did you mean {close[0]!r}?" if close else "`raysys list` shows them"
        raise ConfigError("JOB", command, _known(jobs), remedy)
    _start(command, rest)
    raise AssertionError("a started job replaces this process")


def _start(job: str, arguments: Sequence[str]) -> None:
    """Replace this process by ``python -m jobs.<job>``; signals then reach the job itself."""
    root = str(machine.app_root())
    known = os.environ.get("PYTHONPATH")
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{known}" if known else root}
    sys.stdout.flush()
    command = [sys.executable, "-m", f"jobs.{job}", *arguments]
    os.execve(sys.executable, command, environment)


def _lines(jobs: Sequence[Entry]) -> str:
    return "".join(f"  {job.name:<26} {job.help}\n" for job in jobs)


def _known(jobs: Sequence[Entry]) -> str:
    return "one of " + ", ".join(job.name for job in jobs)
