"""Leaving Ray ends in bounded time, whatever Ray does, and ends no stranger's processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from actors import leaving
from actors.session import Session
from raysys import machine
from raysys.errors import CapabilityError

SLEEPER = "import sys, subprocess; subprocess.run(['sleep', '600'])"
GENEROUS_S = 60.0


@pytest.fixture
def cluster_of() -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Two stand-ins for clusters: a process that names its session, and a child that does not."""
    started = {
        name: subprocess.Popen([sys.executable, "-c", SLEEPER, f"--session={name}"])
        for name in (f"session_a_{os.getpid()}", f"session_b_{os.getpid()}")
    }
    for process in started.values():
        _wait_for_child(process)
    yield started
    for name, process in started.items():
        leaving.end_cluster(name)
        process.wait(GENEROUS_S)


def _wait_for_child(process: subprocess.Popen[bytes]) -> psutil.Process:
    pause = threading.Event()
    while not psutil.Process(process.pid).children():
        assert process.poll() is None
        pause.wait(0.02)
    return psutil.Process(process.pid).children()[0]


def _wait_for_end(process: psutil.Process) -> None:
    pause = threading.Event()
    deadline = time.monotonic() + GENEROUS_S
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        pause.wait(0.02)


def test_a_shutdown_that_waits_for_its_cluster_is_freed(
    cluster_of: dict[str, subprocess.Popen[bytes]], capfd: pytest.CaptureFixture[str]
) -> None:
    mine, other = cluster_of
    child = psutil.Process(cluster_of[mine].pid).children()[0]
    # Like Ray's: it does not return while the cluster's process lives.
    assert leaving.leave(cluster_of[mine].wait, mine, limit_s=0.01, patience_s=GENEROUS_S)
    assert cluster_of[mine].poll() == -9
    _wait_for_end(child)
    assert cluster_of[other].poll() is None
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        f"raysys: Ray did not shut down within 0.01 s; ended 2 processes of {mine}",
    ]
    assert not leaving.is_stuck()


def test_a_shutdown_in_time_says_nothing_and_hands_its_error_on(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert leaving.leave(lambda: None, None)

    def fails() -> None:
        raise ValueError("from shutdown")

    with pytest.raises(ValueError, match="from shutdown"):
        leaving.leave(fails, None)
    assert capfd.readouterr().err == ""


def test_no_session_starts_while_a_shutdown_hangs() -> None:
    free = threading.Event()
    try:
        assert not leaving.leave(free.wait, None, limit_s=0.01, patience_s=0.01)
        with pytest.raises(CapabilityError, match="Start a new process"):
            Session.start()
    finally:
        free.set()
        for thread in threading.enumerate():
            if thread.name == leaving.THREAD_NAME:
                thread.join(GENEROUS_S)
    assert not leaving.is_stuck()


ENDS = """
import atexit, threading
from actors import leaving

lock = threading.RLock()
def shutdown():  # as Ray's: under a lock, and once more when the interpreter ends
    with lock:
        threading.Event().wait()
atexit.register(shutdown)
assert not leaving.leave(shutdown, None, limit_s=0.01, patience_s=0.01)
print("the end")
"""


def test_a_program_ends_although_its_shutdown_never_does(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDS],
        capture_output=True,
        text=True,
        timeout=GENEROUS_S,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(machine.app_root())},
    )
    assert (done.returncode, done.stdout) == (0, "the end\n"), done.stderr
    assert done.stderr.count("\n") == 1
    assert "its call still hangs" in done.stderr
