"""Living processes of a program: its tree, their kinds by title, and SIGKILL by process id."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from typing import Any

from raysys.errors import CapabilityError

POLL_S = 0.05


def _psutil() -> Any:
    try:
        import psutil
    except ImportError as error:
        raise CapabilityError("psutil", str(error), "Run `make setup`") from error
    return psutil


def tree(pid: int) -> dict[int, str]:
    """Titles of a process and its descendants by process id; empty once it is gone.

    Zombies are left out: they are dead, only not yet waited for.
    """
    psutil = _psutil()
    found: dict[int, str] = {}
    try:
        root = psutil.Process(pid)
        members = [root, *root.children(recursive=True)]
    except psutil.Error:
        return found
    for member in members:
        try:
            if member.status() != psutil.STATUS_ZOMBIE:
                found[member.pid] = " ".join(member.cmdline()) or member.name()
        except psutil.Error:
            continue
    return found


def matching(titles: dict[int, str], pattern: str) -> list[int]:
    """Ids of the processes whose title has the pattern, lowest first."""
    return sorted(pid for pid, title in titles.items() if re.search(pattern, title))


def kill(pid: int) -> bool:
    """SIGKILL; False where no such process is left."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def kill_one(root: int, pattern: str, rng: random.Random, patience_s: float) -> bool:
    """Kill one descendant whose title matches; waits until there is one, or the root is gone."""
    end_s = time.monotonic() + patience_s
    while True:
        titles = tree(root)
        candidates = [pid for pid in matching(titles, pattern) if pid != root]
        if candidates and kill(rng.choice(candidates)):
            return True
        if not titles or time.monotonic() > end_s:
            return False
        time.sleep(POLL_S)


def wait_gone(pids: list[int], patience_s: float) -> int:
    """Wait until processes have ended; kill what is left, and return how many those were."""
    psutil = _psutil()
    end_s = time.monotonic() + patience_s
    left = pids
    while left and time.monotonic() < end_s:
        left = [pid for pid in left if psutil.pid_exists(pid) and tree(pid)]
        time.sleep(POLL_S)
    return sum(kill(pid) for pid in left)
