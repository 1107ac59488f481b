"""A move changes nothing but where the work runs, and a kill loses no more than the interval."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from actors.swan.checkpoint import ResumableSampler, random_state
from actors.swan.engine import EngineConfig, Swan
from raysys import machine, scratch
from raysys.bench import Baseline, Claim, Profile
from raysys.errors import RemoteError
from raysys.federated.swan.choices import Choice, enumerate_choices
from raysys.federated.swan.pilot import Policy

SAMPLES, BATCH = 512, 16


class Sums:
    """A small task with all kinds of state: Adam's moments, dropout, a shuffled sampler."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(
            nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, 256), nn.ReLU(),
            nn.Linear(256, 10),
        )  # fmt: skip
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        rng = np.random.default_rng(seed)
        self.inputs = torch.from_numpy(rng.standard_normal((SAMPLES, 64)).astype(np.float32))
        self.labels = torch.from_numpy(rng.integers(0, 10, SAMPLES))
        self.sampler = ResumableSampler(SAMPLES, seed)

    def step(self) -> None:
        """One step on the next batch; the optimiser moves last, when all else has been counted."""
        index = torch.from_numpy(next(self.sampler.batches(BATCH)))
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(self.inputs[index]), self.labels[index])
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def parts(self) -> dict[str, Any]:
        """What a checkpoint must hold, the optimiser aside."""
        return {"model": self.model, "sampler": self.sampler}


def digest(task: Sums) -> str:
    """Hash of parameters, optimiser state and every generator."""
    state = {**task.model.state_dict()}
    for number, values in task.optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{number}.{name}": value for name, value in values.items()}
    found = hashlib.sha256()
    for name in sorted(state):
        found.update(name.encode() + state[name].detach().contiguous().numpy().tobytes())
    generators = random_state()
    found.update(generators["torch"].numpy().tobytes() + generators["numpy"][1].numpy().tobytes())
    found.update(repr((generators["python"], generators["numpy"][2:])).encode())
    return found.hexdigest()


def moves_bitwise(profile: Profile) -> Claim:
    """Differences after 1,000 forced moves: across each move, and against a run without moves."""
    moves = profile.pick(200, 1000)
    still = _run(moves, moving=False)
    moved = _run(moves, moving=True)
    across = _across(moves)
    return Claim(
        name="moves_bitwise",
        value=float(across + (still != moved)),
        unit=f"differing hashes after {moves} moves",
        better="lower",
        baseline=Baseline(name="the same run without moves", value=0.0),
        samples={"changed_across_a_move": across, "run_equal": still == moved, "moves": moves},
    )


def _run(steps: int, moving: bool) -> str:
    """Train at a fixed number of threads, moving between core sets or not; the final hash."""
    policy = Policy(kind="greedy", deterministic=True)
    with Swan(EngineConfig(policy=policy, nice=0, sample_s=30.0)) as swan:
        task = Sums()
        sets = _core_sets(swan)
        with swan.training(optimizer=task.optimizer, **task.parts()):
            for step in range(steps):
                if moving:
                    swan.force(sets[step % len(sets)])
                task.step()
        return digest(task)


def _across(moves: int) -> int:
    """Moves that also change the thread count, hashed right before and after each."""
    changed = 0
    with Swan(EngineConfig(policy=Policy(kind="greedy"), nice=0, sample_s=30.0)) as swan:
        task = Sums()
        sets = _core_sets(swan)
        for number in range(moves):
            if number % 10 == 0:
                task.step()
            before = digest(task)
            swan.force(sets[number % len(sets)])
            changed += digest(task) != before
    return changed


def _core_sets(swan: Swan) -> list[Choice]:
    """Every size of core set, and single cores in turn."""
    topology = swan.topology
    sets = enumerate_choices(topology)
    one = sets[0].counts
    return [*sets, *(Choice(one, (core,)) for core in topology.clusters[0].cores)]


def kills_lose_little(profile: Profile) -> Claim:
    """Work lost by SIGKILL at random moments, at most, against the checkpoint interval.

    In CPU seconds of the killed process since its last save or resume: on a loaded machine it may
    have been waiting for the rest of the time, which the samples hold as well.
    """
    kills, interval_s = profile.pick(10, 100), 0.2
    with scratch.folder("swan") as folder:
        found = run_kills(folder, kills, interval_s, steps=profile.pick(600, 2000))
    return Claim(
        name="kills_lose_little",
        value=found["most_lost_cpu_s"],
        unit="CPU seconds of work lost by a kill, at most",
        better="lower",
        baseline=Baseline(name="checkpoint interval", value=interval_s),
        ratio=found["most_lost_cpu_s"] / interval_s,
        samples=found,
        seeds=[0],
    )


def run_kills(folder: Path, kills: int, interval_s: float, steps: int) -> dict[str, Any]:
    """Kill a training again and again in a process of its own; see ``kill_program``.

    Raises:
        RemoteError: that process failed.
    """
    arguments = [str(folder), str(kills), str(interval_s), str(steps)]
    command = [sys.executable, "-m", "jobs.bench.swan.kill_program", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        cwd=machine.app_root(),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    if done.returncode:
        raise RemoteError("kill_program", done.stderr[-2000:], "See its output")
    return dict(json.loads(done.stdout.splitlines()[-1]))
