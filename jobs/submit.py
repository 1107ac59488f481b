"""Run a job on a cluster through the Ray Jobs API and follow its output.

    raysys submit JOB --address http://HOST:8265 [--no-wait] [-- ARGUMENTS OF THE JOB]

The code of this checkout (or of the installed package) travels as the working directory. Give the
job ``--run-dir`` with a URI that the cluster can write (``s3://``, a shared folder) to keep its
results: the working directory on the cluster is temporary.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from actors.session import split_address, use_token_if_present
from raysys import machine
from raysys.cli.catalogue import find_jobs
from raysys.errors import ConfigError, RaysysError, RemoteError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
# What a job does not need; .git, .venv and what git ignores are left out by Ray itself.
EXCLUDES = ["/tests", "/docs", "/runs"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Submit from the command line; the exit code tells how the job ended."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    own, job_arguments = _split(words)
    parser = argparse.ArgumentParser(
        prog="raysys submit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("job", help="name of the job; `raysys list` shows them")
    parser.add_argument(
        "--address", default=DEFAULT_ADDRESS, help="the cluster's dashboard, http://HOST:PORT"
    )
    parser.add_argument("--no-wait", action="store_true", help="print the id and return at once")
    options = parser.parse_args(own)
    try:
        return submit(options.job, job_arguments, options.address, wait=not options.no_wait)
    except RaysysError as error:
        print(f"raysys: error: {error}", file=sys.stderr)
        return error.exit_code


def submit(job: str, arguments: Sequence[str], address: str, *, wait: bool) -> int:
    """Submit a job and, unless told otherwise, follow it to its end.

    Returns:
        0 when it succeeded (or was submitted without waiting), 1 when it failed or was stopped.

    Raises:
        ConfigError: there is no such job.
        RemoteError: the cluster does not answer or refuses.
    """
    known = [entry.name for entry in find_jobs(machine.app_root())]
    if job not in known:
        raise ConfigError("JOB", job, "one of " + ", ".join(known))
    client = _connect(address)
    entrypoint = shlex.join(["python", "-m", f"jobs.{job}", *arguments])
    try:
        identity = send(client, entrypoint, job)
    except (RuntimeError, ConnectionError, ValueError) as error:
        raise RemoteError(address, str(error).split("\n", 1)[0]) from error
    print(f"submitted {identity}: {entrypoint}", flush=True)
    return _follow(client, identity, address) if wait else 0


def send(client: Any, entrypoint: str, job: str) -> str:
    """Hand an entrypoint over to a JobSubmissionClient with this code; returns the job's id."""
    identity = client.submit_job(
        entrypoint=entrypoint,
        runtime_env={
            "working_dir": str(machine.app_root()),
            "excludes": EXCLUDES,
            "env_vars": {"OMP_WAIT_POLICY": "PASSIVE"},
        },
        metadata={"raysys_job": job},
    )
    return str(identity)


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in words:
        return words, []
    cut = words.index("--")
    return words[:cut], words[cut + 1 :]


def _connect(address: str) -> Any:
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    split_address(address)
    use_token_if_present()
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, AuthenticationError) as error:
        reason = str(error).split("\n", 1)[0]
        raise RemoteError(
            address,
            reason,
            "Check that the dashboard listens there; a cluster with token authentication wants "
            "RAY_AUTH_MODE=token and its token in RAY_AUTH_TOKEN or ~/.ray/auth_token",
        ) from error


def _follow(client: Any, identity: str, address: str) -> int:
    async def show() -> None:
        async for text in client.tail_job_logs(identity):
            print(text, end="", flush=True)

    try:
        asyncio.run(show())
        status = client.get_job_status(identity)
    except KeyboardInterrupt:
        client.stop_job(identity)
        print(f"stopped {identity}", file=sys.stderr)
        return 130
    except (RuntimeError, OSError) as error:
        raise RemoteError(address, f"lost the job {identity} ({error})") from error
    print(f"{identity}: {status}")
    return 0 if str(status) == "SUCCEEDED" else 1


if __name__ == "__main__":
    raise SystemExit(main())
