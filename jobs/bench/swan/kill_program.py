"""Forks a training, kills it at a random moment, resumes it, and so on; prints what was lost.

    python -m jobs.bench.swan.kill_program FOLDER KILLS INTERVAL_S STEPS

The children share a page with the parent, in which each notes when a step ended and from which step
it went on. In the end the training runs through, and must equal one that was never killed, bit by
bit.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import struct
import sys
import time
from pathlib import Path

import torch

from actors.swan.engine import EngineConfig, Swan
from jobs.bench.swan.moves import Sums, digest
from raysys.federated.swan.pilot import Policy

SLOT = struct.Struct("d")
RESUMED, DONE, RESUMED_S, RESUMED_CPU_S, HEADER = range(5)  # then two stamps for every step
LONGEST_S = 0.8


def train(folder: Path | None, interval_s: float, steps: int, page: mmap.mmap | None) -> str:
    """Train to ``steps``, resuming from the folder; the final hash."""
    task = Sums()
    config = EngineConfig(
        policy=Policy(kind="fixed"), nice=0, sample_s=30.0, checkpoint_s=interval_s, min_step_s=0.0
    )
    with (
        Swan(config) as swan,
        swan.training(optimizer=task.optimizer, folder=folder, **task.parts()) as run,
    ):
        _note(page, RESUMED_S, time.monotonic())
        _note(page, RESUMED_CPU_S, time.process_time())
        _note(page, RESUMED, float(run.steps))
        while run.steps < steps:
            task.step()
            _note(page, DONE, float(run.steps))
            _note(page, HEADER + 2 * run.steps - 2, time.monotonic())
            _note(page, HEADER + 2 * run.steps - 1, time.process_time())
    return digest(task)


def main(arguments: list[str]) -> None:
    """Kill so many times, then let it finish, and print a JSON line."""
    folder, kills = Path(arguments[0]), int(arguments[1])
    interval_s, steps = float(arguments[2]), int(arguments[3])
    torch.set_num_threads(1)
    train(None, interval_s, 1, None)  # what loads at the first step loads here, not in every child
    page = mmap.mmap(-1, SLOT.size * (HEADER + 2 * steps))
    _note(page, RESUMED, -1.0)
    rng = random.Random(0)
    lost: list[tuple[float, float]] = []
    done_steps, cut_short, trial = [0], 0, 0
    for number in range(kills):
        child = _child(folder / f"run-{trial}", interval_s, steps, page)
        time.sleep(rng.uniform(0.02, LONGEST_S))
        killed_s = time.monotonic()
        os.kill(child, signal.SIGKILL)
        _, _, used = os.wait4(child, 0)
        cpu_s = used.ru_utime + used.ru_stime
        began, done = _read(page, RESUMED), int(_read(page, DONE))
        since = _read(page, RESUMED_S), _read(page, RESUMED_CPU_S)
        if done >= steps:
            trial, cut_short = trial + 1, cut_short + 1  # ran through before the kill: start anew
        probe = _child(folder / f"run-{trial}", interval_s, steps, page, probe=True)
        _, status = os.waitpid(probe, 0)
        if status:
            raise SystemExit(f"resume {number} failed with status {status}")
        start = int(_read(page, RESUMED))
        if start > began >= 0:
            since = _read(page, HEADER + 2 * start - 2), _read(page, HEADER + 2 * start - 1)
        if began >= 0 and done < steps:
            # A kill between the save of a step and the note of its end has cost nothing.
            whole = start > done
            lost.append((0.0, 0.0) if whole else (killed_s - since[0], cpu_s - since[1]))
            done_steps.append(done)
        _note(page, RESUMED, -1.0)
        _note(page, DONE, 0.0)
    final = train(folder / f"run-{trial}", interval_s, steps, None)
    straight = train(None, interval_s, steps, None)
    result = {
        "kills": kills,
        "most_lost_s": max((row[0] for row in lost), default=0.0),
        "most_lost_cpu_s": max((row[1] for row in lost), default=0.0),
        "mean_lost_s": sum(row[0] for row in lost) / max(len(lost), 1),
        "resumes": len(lost),
        "finished_before_the_kill": cut_short,
        "furthest_step": max(done_steps),
        "equal_to_a_run_without_kills": final == straight,
        "interval_s": interval_s,
    }
    print(json.dumps(result), flush=True)


def _child(
    folder: Path, interval_s: float, steps: int, page: mmap.mmap, probe: bool = False
) -> int:
    """Fork a training; a probe only resumes and notes from where."""
    child = os.fork()
    if child:
        return child
    try:
        train(folder, interval_s, 0 if probe else steps, page)
        os._exit(0)
    except BaseException as error:
        print(f"child failed: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)


def _note(page: mmap.mmap | None, slot: int, value: float) -> None:
    if page is not None:
        SLOT.pack_into(page, SLOT.size * slot, value)


def _read(page: mmap.mmap, slot: int) -> float:
    return float(SLOT.unpack_from(page, SLOT.size * slot)[0])


if __name__ == "__main__":
    main(sys.argv[1:])
