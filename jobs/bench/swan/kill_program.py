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
HEADER = 2  # slots: step of the resume, steps done
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
        _note(page, 0, float(run.steps))
        while run.steps < steps:
            task.step()
            _note(page, 1, float(run.steps))
            _note(page, HEADER + run.steps - 1, time.monotonic())
    return digest(task)


def main(arguments: list[str]) -> None:
    """Kill so many times, then let it finish, and print a JSON line."""
    folder, kills = Path(arguments[0]), int(arguments[1])
    interval_s, steps = float(arguments[2]), int(arguments[3])
    torch.set_num_threads(1)
    train(None, interval_s, 1, None)  # what loads at the first step loads here, not in every child
    page = mmap.mmap(-1, SLOT.size * (HEADER + steps))
    rng = random.Random(0)
    lost_s, resumed, done_steps, cut_short = [0.0], [0], [0], 0
    trial = 0
    for number in range(kills):
        child = _child(folder / f"run-{trial}", interval_s, steps, page)
        time.sleep(rng.uniform(0.02, LONGEST_S))
        killed_s = time.monotonic()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        done = int(_read(page, 1))
        if done >= steps:
            trial, cut_short = trial + 1, cut_short + 1  # ran through before the kill: start anew
        _note(page, 0, -1.0)
        probe = _child(folder / f"run-{trial}", interval_s, steps, page, probe=True)
        _, status = os.waitpid(probe, 0)
        if status:
            raise SystemExit(f"resume {number} failed with status {status}")
        start = int(_read(page, 0))
        saved_s = _read(page, HEADER + start - 1) if start else 0.0
        if start and done < steps:
            lost_s.append(max(killed_s - saved_s, 0.0))
            resumed.append(start)
            done_steps.append(done)
        _note(page, 1, 0.0)
    final = train(folder / f"run-{trial}", interval_s, steps, None)
    straight = train(None, interval_s, steps, None)
    result = {
        "kills": kills,
        "most_lost_s": max(lost_s),
        "mean_lost_s": sum(lost_s[1:]) / max(len(lost_s) - 1, 1),
        "resumes": len(lost_s) - 1,
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
