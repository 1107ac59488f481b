"""The serve job's errors come before Ray starts, as one line and an exit code."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path
from typing import Any

import pytest

from actors.serving.endpoint import free_port
from jobs import serve
from jobs.launcher import main
from raysys.errors import ConfigError, RemoteError, StorageError


def run_job(tmp_path: Path, *overrides: str) -> int:
    arguments = ["--run-dir", str(tmp_path / "run"), "--address", "local"]
    for override in overrides:
        arguments += ["--set", override]
    return main(serve.JOB, arguments)


def test_a_taken_port_ends_with_code_2(tmp_path: Path, capsys: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code = run_job(tmp_path, f"port={taken.getsockname()[1]}")
    assert code == 2
    assert "a free port" in capsys.readouterr().err


def test_a_missing_model_folder_ends_with_code_6(tmp_path: Path, capsys: Any) -> None:
    code = run_job(tmp_path, f"port={free_port()}", f"model.folder={tmp_path / 'absent'}")
    assert code == 6
    error = capsys.readouterr().err
    assert "no such model folder" in error
    assert str(tmp_path / "absent") in error
    assert len(error.strip().splitlines()) == 1


def test_a_missing_vllm_ends_with_code_3(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run_job(tmp_path, f"port={free_port()}") == 3
    assert "make setup" in capsys.readouterr().err


def test_serve_run_arguments_are_config_fields(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        serve.app({"engine.max_num_seqs": "many"})
    assert caught.value.field == "engine.max_num_seqs"
    with pytest.raises(StorageError, match="no such model folder"):
        serve.app({"model.folder": str(tmp_path / "absent")})


class FakeContext:
    """Stands in for the job's context; the clock jumps a minute a look."""

    def __init__(self, states: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
        self.printed: list[str] = []
        self.events: list[str] = []
        self.console = self
        self.metrics = self
        looks = iter(states)
        self._now = 0.0
        monkeypatch.setattr(serve, "application_state", lambda: next(looks))
        monkeypatch.setattr(serve.time, "monotonic", lambda: self._now)
        monkeypatch.setattr(serve.time, "sleep", self._sleep)

    def _sleep(self, seconds: float) -> None:
        self._now += 60.0

    def print(self, text: str) -> None:
        self.printed.append(text)

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append(kind)


def test_a_replaced_engine_is_reported_and_serving_goes_on(monkeypatch: Any) -> None:
    states = [("RUNNING", ""), ("UNHEALTHY", "x"), ("DEPLOYING", ""), ("RUNNING", "")]
    context: Any = FakeContext(states, monkeypatch)
    with pytest.raises(StopIteration):
        serve.watch(context)
    assert context.events == ["engine lost"]
    assert context.printed[-1] == "the engine is back"


def test_an_engine_that_stays_away_ends_the_job(monkeypatch: Any) -> None:
    context: Any = FakeContext([("UNHEALTHY", "EngineDeadError: gone")] * 9, monkeypatch)
    with pytest.raises(RemoteError, match="EngineDeadError: gone") as caught:
        serve.watch(context, grace_s=120.0)
    assert caught.value.exit_code == 5
