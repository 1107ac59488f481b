"""A head started by ``ray start``: submission, the CLI's own submission, tokens, lost nodes.

Every head here has a home, a token, ports and a temporary folder of its own, so that it cannot meet
another cluster on the machine.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs.bench.cluster.nodes import free_ports
from raysys import machine, scratch

ROOT = machine.app_root()
BIN = Path(sys.executable).parent


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """A running head and how to reach it."""

    dashboard: str
    address: str
    environment: dict[str, str]

    def run(self, *words: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a program of this environment from the checkout, as a user of this head."""
        return subprocess.run(
            [str(BIN / words[0]), *words[1:]],
            env=self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )


@pytest.fixture(scope="module")
def head(
    tmp_path_factory: pytest.TempPathFactory, isolate: Callable[[Path], dict[str, str]]
) -> Iterator[Head]:
    """A head by ``ray start`` with four logical CPUs."""
    environment = isolate(tmp_path_factory.mktemp("home"))
    # Unix sockets have short names: pytest's own folder would be too long.
    temporary = scratch.kept("rs")
    port, dashboard, agent, client = free_ports(4)
    command = [
        str(BIN / "ray"),
        "start",
        "--head",
        f"--port={port}",
        f"--dashboard-port={dashboard}",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-agent-listen-port={agent}",
        f"--ray-client-server-port={client}",
        "--num-cpus=4",
        f"--object-store-memory={256 * 2**20}",
        f"--temp-dir={temporary}",
        "--disable-usage-stats",
        "--block",
    ]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        seen = []
        for line in process.stdout:
            seen.append(line)
            if "--block" in line:
                break
        else:
            pytest.fail("ray start ended: " + "".join(seen))
        yield Head(
            dashboard=f"http://127.0.0.1:{dashboard}",
            address=f"127.0.0.1:{port}",
            environment={**environment, "RAY_TMPDIR": str(temporary)},
        )
        process.terminate()
        process.wait(timeout=60)


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_ray_job_submit_runs_the_smoke_tour(head: Head) -> None:
    """The command of the README, on a stage of each family; every stage takes minutes."""
    words = ["job", "submit", "--address", head.dashboard, "--working-dir", ".", "--"]
    stages = "stages=[serving,ccs,federated,venn]"
    tour = ["python", "-m", "jobs.tour", "--profile", "smoke", "--set", stages]
    done = head.run("ray", *words, *tour, timeout_s=580)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "stages ran on the given cluster" in done.stdout
    assert "FAILED" not in done.stdout


@pytest.mark.cluster
def test_raysys_submit_follows_a_job_and_tells_how_it_ended(head: Head) -> None:
    good = head.run("raysys", "submit", "bench", "--address", head.dashboard, "--", "--help")
    assert good.returncode == 0, good.stdout + good.stderr
    assert "SUCCEEDED" in good.stdout
    bad = head.run("raysys", "submit", "tour", "--address", head.dashboard, "--", "--set", "x=1")
    assert bad.returncode == 1
    assert "raysys: error: x: expected one of the fields" in bad.stdout


@pytest.mark.cluster
def test_submit_without_the_token_is_refused_with_a_remedy(head: Head) -> None:
    stranger = {**head.environment, "RAY_AUTH_TOKEN": "wrong"}
    outsider = dataclasses.replace(head, environment=stranger)
    done = outsider.run("raysys", "submit", "tour", "--address", head.dashboard)
    assert done.returncode == 5
    assert "RAY_AUTH_TOKEN" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.cluster
def test_a_job_connects_by_address(head: Head, tmp_path: Path) -> None:
    script = tmp_path / "connect.py"
    script.write_text(
        "import ray, sys\n"
        "from actors.session import Session, SessionConfig\n"
        "with Session.start(SessionConfig(address=sys.argv[1])) as session:\n"
        "    print(session.private, ray.get(ray.remote(lambda: 42).remote()))\n"
    )
    done = head.run("python", str(script), head.address)
    assert done.stdout.split() == ["False", "42"], done.stderr[-2000:]


def test_submit_of_an_unknown_job(isolated_environment: dict[str, str]) -> None:
    done = subprocess.run(
        [str(BIN / "raysys"), "submit", "turo", "--address", "http://127.0.0.1:9"],
        env=isolated_environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert "'turo'" in done.stderr


def test_submit_to_a_dead_address(isolated_environment: dict[str, str]) -> None:
    done = subprocess.run(
        [str(BIN / "raysys"), "submit", "tour", "--address", "http://127.0.0.1:9"],
        env=isolated_environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 5
    assert "127.0.0.1:9" in done.stderr
