"""Leaving Ray in bounded time: ``ray.shutdown`` may wait for ever for a cluster that is stuck.

Seen with Ray 2.60: it unsubscribes from the head's control service (GCS) without a time limit. A
private cluster is to end anyway, so its processes are ended, which also frees the waiting call.
"""

from __future__ import annotations

import atexit
import sys
import threading
from collections.abc import Callable
from typing import Any

THREAD_NAME = "raysys-leave-ray"
LIMIT_S = 60.0
PATIENCE_S = 20.0


def leave(
    shutdown: Callable[[], Any],
    cluster: str | None,
    *,
    limit_s: float = LIMIT_S,
    patience_s: float = PATIENCE_S,
) -> bool:
    """Call ``shutdown``; what it raises is raised here. True when it came to its end.

    Args:
        shutdown: ``ray.shutdown``. Where it never returns, its handler for the interpreter's exit
            is taken back, since that would wait for the same lock.
        cluster: name of the private cluster's Ray session; None for a cluster that is not ours,
            which is left alone.
        limit_s: how long it may take, in seconds.
        patience_s: how long it may take to return once the cluster's processes were ended.
    """
    errors: list[BaseException] = []
    thread = threading.Thread(target=_call, args=(shutdown, errors), name=THREAD_NAME, daemon=True)
    thread.start()
    thread.join(limit_s)
    if not thread.is_alive():
        if errors:
            raise errors[0]
        return True
    ended = end_cluster(cluster) if cluster else 0
    thread.join(patience_s)
    back = not thread.is_alive()
    if not back:
        atexit.unregister(shutdown)
    print(
        f"raysys: Ray did not shut down within {limit_s:g} s; ended {ended} processes of "
        f"{cluster or 'no cluster (it is not ours)'}"
        + ("" if back else "; its call still hangs, so this process can start no other Ray"),
        file=sys.stderr,
        flush=True,
    )
    return back


def is_stuck() -> bool:
    """Whether an earlier ``leave`` of this process still waits: Ray's lock is taken for good."""
    return any(thread.name == THREAD_NAME for thread in threading.enumerate())


def end_cluster(session: str) -> int:
    """SIGKILL the processes whose command line names the Ray session, with all they started.

    The session's name holds the time and process id of its start; workers change their titles and
    do not name it, but descend from the raylet, which does.

    Returns:
        How many were ended; this process and those that started it are never among them.
    """
    import psutil

    me = psutil.Process()
    spared = {me.pid, *(parent.pid for parent in me.parents())}
    found: dict[int, psutil.Process] = {}
    for root in psutil.process_iter():
        try:
            if root.pid not in spared and session in " ".join(root.cmdline()):
                found |= {member.pid: member for member in (root, *root.children(recursive=True))}
        except psutil.Error:
            continue
    return sum(_kill(member) for pid, member in found.items() if pid not in spared)


def _kill(process: Any) -> bool:
    import psutil

    try:
        process.kill()
    except psutil.Error:
        return False
    return True


def _call(shutdown: Callable[[], Any], errors: list[BaseException]) -> None:
    try:
        shutdown()
    except BaseException as error:
        errors.append(error)
