"""Put every thread of this process on chosen cores, and look where they really ran.

Affinity of the process id moves only the main thread; threads that exist keep theirs. So it is set
for each id in ``/proc/self/task`` until no new one turns up; later threads inherit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

Setter = Callable[[int, Iterable[int]], None]
MAX_PASSES = 5
PROCESSOR_FIELD = 39


@dataclass(frozen=True, slots=True)
class Applied:
    """Outcome: threads moved, and errors of those that refused (thread id, text)."""

    moved: int
    refused: tuple[tuple[int, str], ...] = ()

    @property
    def complete(self) -> bool:
        return not self.refused


def apply_affinity(
    cores: Collection[int], proc_root: Path = Path("/proc"), setter: Setter = os.sched_setaffinity
) -> Applied:
    """Set the affinity of all threads; a thread that has ended meanwhile is no failure."""
    done: set[int] = set()
    refused: dict[int, str] = {}
    for _ in range(MAX_PASSES):
        fresh = [thread for thread in threads(proc_root) if thread not in done]
        if not fresh:
            break
        for thread in fresh:
            done.add(thread)
            try:
                setter(thread, cores)
            except ProcessLookupError:
                continue
            except OSError as error:
                refused[thread] = error.strerror or str(error)
    return Applied(len(done) - len(refused), tuple(refused.items()))


def threads(proc_root: Path = Path("/proc")) -> list[int]:
    """Ids of this process's threads."""
    try:
        return [int(name) for name in os.listdir(proc_root / "self/task") if name.isdigit()]
    except OSError:
        return [os.getpid()]


def run_times(proc_root: Path = Path("/proc")) -> dict[int, tuple[float, int]]:
    """Per thread: seconds on a CPU so far, and the core it ran on last."""
    found: dict[int, tuple[float, int]] = {}
    for thread in threads(proc_root):
        folder = proc_root / f"self/task/{thread}"
        try:
            ran_ns = int((folder / "schedstat").read_text().split()[0])
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            found[thread] = (ran_ns * 1e-9, int(fields[PROCESSOR_FIELD - 3]))
        except (OSError, ValueError, IndexError):
            continue
    return found


def residency(
    before: dict[int, tuple[float, int]],
    after: dict[int, tuple[float, int]],
    cores: Collection[int],
) -> float:
    """Share of CPU time between two looks that threads now on ``cores`` used; 1 when idle."""
    total = inside = 0.0
    for thread, (seconds, core) in after.items():
        used = seconds - before.get(thread, (0.0, -1))[0]
        total += used
        inside += used if core in cores else 0.0
    return inside / total if total > 0 else 1.0


def current_nice() -> int:
    """Nice value of this process."""
    return os.getpriority(os.PRIO_PROCESS, 0)


def lower_priority(nice: int, proc_root: Path = Path("/proc")) -> None:
    """Batch scheduling class and a nice value for all threads; refusals are no failure.

    This comes on top of giving way: priority returns neither caches nor bandwidth nor heat.
    """
    for thread in threads(proc_root):
        try:
            os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))
            os.setpriority(os.PRIO_PROCESS, thread, nice)
        except OSError:
            continue


def restore_priority(nice: int, proc_root: Path = Path("/proc")) -> None:
    """Back to the ordinary class and a former nice value, as far as the system lets us."""
    for thread in threads(proc_root):
        try:
            os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))
            os.setpriority(os.PRIO_PROCESS, thread, nice)
        except OSError:
            continue
