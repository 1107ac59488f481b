"""Sessions: addresses, tokens, and a private Ray that leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from actors import session as session_module
from actors.session import Session, SessionConfig, resolve_address, split_address
from raysys import machine
from raysys.errors import ConfigError, RemoteError


def test_private_session_runs_tasks(ray_session: Session) -> None:
    import ray

    assert ray.get(ray.remote(lambda: 3).remote()) == 3
    assert ray_session.private


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.0.0.1:6379", ("10.0.0.1", 6379)),
        ("ray://head:10001", ("head", 10001)),
        ("http://127.0.0.1:8265/", ("127.0.0.1", 8265)),
        ("[::1]:6379", ("::1", 6379)),
    ],
)
def test_split_address(address: str, expected: tuple[str, int]) -> None:
    assert split_address(address) == expected


@pytest.mark.parametrize("address", ["head", "head:", ":6379", "head:0", "head:70000", "head:x"])
def test_split_address_refuses(address: str) -> None:
    with pytest.raises(ConfigError, match="address"):
        split_address(address)


def test_no_address_means_private(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert resolve_address(None) is None
    assert resolve_address("local") is None


def test_submitted_job_joins_its_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert resolve_address(None) == address


def test_unreachable_address_fails_fast() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(RemoteError, match="nothing answers"):
        Session.start(SessionConfig(address=f"127.0.0.1:{port}"))
    assert time.monotonic() - started < session_module.PROBE_TIMEOUT_S + 5


def test_auto_without_a_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(RemoteError, match="no cluster is known"):
        resolve_address("auto")


def test_token_is_used_when_present(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "restored after the test")
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert not session_module.use_token_if_present()
    (tmp_path / "token").write_text("secret")
    assert session_module.use_token_if_present()
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_users_own_mode_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    assert not session_module.use_token_if_present()
    assert os.environ["RAY_AUTH_MODE"] == "disabled"


@pytest.mark.parametrize(
    "change", [{"num_cpus": 0}, {"object_store_mb": 1}, {"object_store_mb": float("nan")}]
)
def test_bad_session_config(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        SessionConfig(**change)  # type: ignore[arg-type]


WAITING_JOB = """
import sys, time
from jobs.launcher import Job, Summary, main
import dataclasses

@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    pass

def run(config, context):
    import ray
    context.ray(num_cpus=1, object_store_mb=80)
    print("node", ray.get_runtime_context().get_session_name(), flush=True)
    time.sleep(120)
    return Summary()

raise SystemExit(main(Job(name="waiting", config=Config, run=run), sys.argv[1:]))
"""


@pytest.mark.cluster
def test_interrupt_ends_ray_and_leaves_no_process(
    tmp_path: Path, isolated_environment: dict[str, str]
) -> None:
    script = tmp_path / "waiting.py"
    script.write_text(WAITING_JOB)
    environment = {**isolated_environment, "PYTHONPATH": str(machine.app_root())}
    command = [sys.executable, str(script), "--run-dir", str(tmp_path / "run")]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        session_name = process.stdout.readline().split()[1]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert "stopped: SIGINT" in process.stderr.read()
    assert _processes_of(session_name, timeout_s=20) == []
    assert '"interrupted"' in (tmp_path / "run" / "manifest.json").read_text()


def _processes_of(session_name: str, timeout_s: float) -> list[str]:
    """Command lines of processes that mention the Ray session, waiting for them to go."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                line = (folder / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if session_name in line:
                found.append(line)
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)
