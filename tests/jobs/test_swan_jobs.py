"""Swan's programs: kills and moves of the benchmark at their smallest, the stage, certificates."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

import pytest

from jobs.bench.swan import CLAIMS
from jobs.bench.swan.lossy import lossy_relay
from jobs.bench.swan.model import model_check_values
from jobs.bench.swan.moves import _run, run_kills
from jobs.device.__main__ import command_line as device
from jobs.tour.stages.swan import migrate
from raysys.bench import Profile


def test_check_values_and_names() -> None:
    claim = model_check_values(Profile())
    assert (claim.value, claim.samples["wrong"]) == (0.0, [])
    assert claim.samples["cells"] == 52
    assert {"real_choice", "owner_experience", "fleet", "edge_end_to_end"} <= set(CLAIMS)


def test_moves_change_no_bit() -> None:
    assert _run(30, moving=True) == _run(30, moving=False)


def test_a_killed_training_ends_like_one_that_was_not(tmp_path: Path) -> None:
    found = run_kills(tmp_path, kills=3, interval_s=0.1, steps=400)
    assert found["equal_to_a_run_without_kills"]
    # How much time a kill costs is the benchmark's to measure: here the machine may stall.
    assert found["kills"] == 3


def test_the_stage_trains_and_notes_its_moves() -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    found = migrate(before_s=0.6, owner_s=1.0, after_s=0.1)
    assert found.steps
    assert found.moves[0][2] == "start"


def test_certificates_are_private(tmp_path: Path) -> None:
    folder, run_dir = tmp_path / "pem", tmp_path / "run"
    words = ["certificates", "--set", f"folder={folder}", "--run-dir", str(run_dir)]
    assert device(words) == 0
    key = folder / "device-0.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    authority = (folder / "authority.pem").read_bytes()
    assert device([*words[:-1], str(tmp_path / "again"), "--set", "devices=2"]) == 0
    assert (folder / "authority.pem").read_bytes() == authority
    assert (folder / "device-1.pem").exists()


def test_unknown_commands_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert device(["--help"]) == 0
    assert "raysys device join" in capsys.readouterr().out
    assert device(["teleport"]) == 2
    assert "one of join" in capsys.readouterr().err
    assert device(["join", "--set", "server=nowhere"]) == 2


def test_a_device_listens_for_a_while(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["listen", "--listen", "127.0.0.1:0", "--run-dir", str(tmp_path / "run")]
    words += ["--set", "duration_s=0.05", "--set", f"device.state={tmp_path / 'state'}"]
    assert device(words) == 0
    assert "device 127.0.0.1:" in capsys.readouterr().out
    assert (tmp_path / "state" / "device.json").exists()


def test_relay_passes_bytes_on_and_cuts() -> None:
    import socket
    import threading

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def echo() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(connection.recv(100))
                connection.recv(1)

        thread = threading.Thread(target=echo)
        thread.start()
        with lossy_relay(f"127.0.0.1:{port}", cut_after_s=0.2, delay_s=0.0, seed=1) as address:
            host, _, relay_port = address.rpartition(":")
            with socket.create_connection((host, int(relay_port)), timeout=10) as client:
                client.sendall(b"hello")
                assert client.recv(100) == b"hello"
                with contextlib.suppress(ConnectionResetError):
                    assert client.recv(1) == b"", "cut, with or without a reset"
        thread.join(10)
