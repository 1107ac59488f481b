"""Other processes on this host: a pinned duty-cycle burner, and an owner who draws frames.

Each is this file, run as a script in a process of its own by :func:`burner` and :func:`frames`; it
needs the standard library alone, so that it is up at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PERIOD_S = 1 / 60
BURN_CYCLE_S = 0.005
BLOCK = bytes(65_536)


@contextlib.contextmanager
def burner(core: int, share: float) -> Iterator[None]:
    """Keep ``share`` of one core busy, in cycles of 5 ms, at equal priority."""
    process = _start("burn", str(core), str(share))
    try:
        _line(process)
        yield
    finally:
        process.kill()
        process.wait()
        _close(process)


@contextlib.contextmanager
def frames(
    path: Path, on_s: float, off_s: float, share: float = 0.4
) -> Iterator[Callable[[], None]]:
    """An owner who draws 60 frames a second for ``on_s``, then rests for ``off_s``, and so on.

    Enter it before the training starts, or the owner would inherit its cores and its priority; the
    frames begin when the yielded function is called.

    Every frame is a fixed amount of work that takes ``share`` of its period on a free core; the
    system places the process. Writes a line per frame to ``path``: due time (monotonic), seconds
    late, 1 for the first frame of a burst.
    """
    process = _start("frames", str(path), str(on_s), str(off_s), str(share))
    try:
        _line(process)

        def begin() -> None:
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.flush()

        yield begin
    finally:
        process.terminate()
        process.wait()
        _close(process)


def _start(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _line(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return process.stdout.readline()


def _close(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    process.stdout.close()
    assert process.stdin is not None
    process.stdin.close()


def _burn(core: int, share: float) -> None:
    os.sched_setaffinity(0, [core])
    print("{}", flush=True)
    while True:
        started_s = time.perf_counter()
        while time.perf_counter() - started_s < share * BURN_CYCLE_S:
            pass
        time.sleep(max((1 - share) * BURN_CYCLE_S, 0.0))


def _work(blocks: int) -> None:
    for _ in range(blocks):
        hashlib.sha256(BLOCK).digest()


def _calibrated(share: float) -> int:
    """Blocks that take ``share`` of a period on a free core: by the fastest of many tries."""
    best_s = min(_timed(20) for _ in range(50)) / 20
    return max(int(share * PERIOD_S / best_s), 1)


def _timed(blocks: int) -> float:
    started_s = time.perf_counter()
    _work(blocks)
    return time.perf_counter() - started_s


def _draw(path: Path, on_s: float, off_s: float, share: float) -> None:
    blocks = _calibrated(share)
    print(json.dumps({"blocks": blocks}), flush=True)
    sys.stdin.readline()
    with path.open("w", encoding="utf-8", buffering=1) as file:
        while True:
            burst_s = time.monotonic()
            count = int(on_s / PERIOD_S)
            for number in range(count):
                due_s = burst_s + number * PERIOD_S
                pause_s = due_s - time.monotonic()
                if pause_s > 0:
                    time.sleep(pause_s)
                _work(blocks)
                late_s = time.monotonic() - due_s - PERIOD_S
                file.write(f"{due_s:.6f} {late_s:.6f} {int(number == 0)}\n")
                if late_s > 0.25:  # a real display drops the frames that it missed
                    burst_s += late_s
            time.sleep(off_s)


def main(arguments: list[str]) -> None:
    """Run one load until killed."""
    kind, *rest = arguments
    if kind == "burn":
        _burn(int(rest[0]), float(rest[1]))
    else:
        _draw(Path(rest[0]), float(rest[1]), float(rest[2]), float(rest[3]))


if __name__ == "__main__":
    main(sys.argv[1:])
