"""Clusters of several Ray nodes on this machine, closed to everybody without their token."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import secrets
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from jobs.submit import send
from raysys import machine, scratch
from raysys.errors import RemoteError

T = TypeVar("T")
OBJECT_STORE = 100 * 2**20
POLL_S = 0.5
FINISHED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """A submitted job that has ended.

    Args:
        status: as Ray tells it. seconds: from its start to its end.
        nodes: how many nodes its actors and tasks ran on. log: the end of its output.
    """

    status: str
    seconds: float
    nodes: int
    log: str


class NodeCluster:
    """A running cluster and its job door."""

    def __init__(self, dashboard: str) -> None:
        from ray.job_submission import JobSubmissionClient

        self.dashboard = dashboard
        self._client = JobSubmissionClient(dashboard)

    def submit(self, words: Sequence[str]) -> str:
        """Submit ``python -m jobs.NAME ARGUMENTS`` as ``raysys submit`` does; return its id."""
        return send(self._client, shlex.join(["python", "-m", *words]), words[0])

    def status(self, job: str) -> str:
        """Ray's word for the state of a job."""
        return str(self._client.get_job_status(job))

    def stop(self, job: str, limit_s: float = 60.0) -> None:
        """Ask a job to end and wait until it has."""
        self._client.stop_job(job)
        self.wait(job, limit_s)

    def wait(self, job: str, limit_s: float) -> None:
        """Wait for a job's end.

        Raises:
            RemoteError: it does not come in time.
        """
        deadline = time.monotonic() + limit_s
        while self.status(job) not in FINISHED:
            if time.monotonic() > deadline:
                log = self._client.get_job_logs(job)[-2000:]
                raise RemoteError(f"job {job}", f"still runs after {limit_s:.0f} s: {log}")
            time.sleep(POLL_S)

    def ended(self, job: str) -> Ended:
        """What became of a job."""
        info = self._client.get_job_info(job)
        return Ended(
            status=str(info.status),
            seconds=((info.end_time or 0) - (info.start_time or 0)) / 1000.0,
            nodes=len(self._nodes_of(job)),
            log=self._client.get_job_logs(job)[-1500:],
        )

    def _nodes_of(self, job: str) -> set[str]:
        """Nodes of the actors and tasks of a job, those that are over included."""
        from ray.util.state import list_actors, list_tasks

        ray_job = next(k.job_id for k in self._client.list_jobs() if k.submission_id == job)
        if not ray_job:  # it never joined the cluster
            return set()
        own = [("job_id", "=", ray_job)]
        options: dict[str, Any] = {"address": self.dashboard, "filters": own, "limit": 10_000}
        found = [*list_actors(**options), *list_tasks(detail=True, **options)]
        return {str(entry.node_id) for entry in found if entry.node_id}


@contextlib.contextmanager
def several_nodes(nodes: int, cpus: int) -> Iterator[NodeCluster]:
    """Start a head without CPUs and ``nodes`` nodes of ``cpus``; all end with the block.

    To be called through :func:`in_own_home`: Ray reads its token and its switches once a process.
    """
    from ray.cluster_utils import Cluster

    dashboard, agent, client = free_ports(3)
    home = Path.home() / "ray"
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "include_dashboard": True,
            "dashboard_host": "127.0.0.1",
            "dashboard_port": dashboard,
            "dashboard_agent_listen_port": agent,
            "ray_client_server_port": client,
            "object_store_memory": OBJECT_STORE,
            "temp_dir": str(home),
        },
    )
    try:
        # As `ray start` does: without it a job gets the address of any Ray of this machine.
        (home / "ray_current_cluster").write_text(str(cluster.address), encoding="utf-8")
        for _ in range(nodes):
            cluster.add_node(num_cpus=cpus, object_store_memory=OBJECT_STORE)
        yield NodeCluster(f"http://127.0.0.1:{dashboard}")
    finally:
        cluster.shutdown()


def in_own_home(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a new process with a home and a token that no other cluster knows."""
    spawn = multiprocessing.get_context("spawn")
    # Unix sockets have short names: the folder must be short as well.
    with scratch.folder("rs") as home, ProcessPoolExecutor(1, mp_context=spawn) as pool:
        with _environment(own_home(home)):
            future = pool.submit(function, *arguments)
        return future.result()


def free_ports(count: int) -> list[int]:
    """Distinct ports of the loopback that are free now."""
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [server.getsockname()[1] for server in servers]


def own_home(home: Path) -> dict[str, str]:
    """The environment of a process that no other cluster of the machine can meet."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return {
        **kept,
        "HOME": str(home),
        # As after `source .venv/bin/activate`: a job's entrypoint says just "python".
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "RAYSYS_HOME": str(machine.cache_dir()),
    }


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
