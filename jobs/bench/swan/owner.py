"""The owner's experience: frames missed while a training runs beside them."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from actors.swan.affinity import apply_affinity, lower_priority, restore_priority
from actors.swan.engine import EngineConfig, Swan
from jobs.bench.swan.loads import frames
from jobs.bench.swan.networks import Training
from raysys import scratch
from raysys.bench import Baseline, Claim, Profile
from raysys.errors import CapabilityError
from raysys.federated.swan.controller import ControllerConfig
from raysys.federated.swan.pilot import Policy

NETWORK = "ResNet"
ON_S, OFF_S = 3.0, 7.0
MODES = ("nothing", "greedy", "greedy, nice", "swan")
NICE = EngineConfig().nice
QUIET_MISSED = 0.1  # above this the host is too busy for the comparison to mean anything


def owner_experience(profile: Profile) -> Claim:
    """Added missed frames in percentage points, Swan and greedy against no training at all.

    All modes take turns; throughput is compared with the same mode without an owner. "greedy,
    nice" has Swan's low priority and never moves: what the scheduler alone can do.
    """
    if len(os.sched_getaffinity(0)) < 2:
        raise CapabilityError("two cores", "this process may use one", "Run it on a larger host")
    repeats, cycles = profile.pick(1, 2), profile.pick(1, 4)
    modes = profile.pick(("nothing", "greedy", "swan"), MODES)
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in modes}
    undisturbed: dict[str, list[float]] = {mode: [] for mode in modes[1:]}
    for _ in range(repeats):
        for mode in modes:
            runs[mode].append(_with_owner(mode, cycles))
        for mode, found in undisturbed.items():
            found.append(_alone(mode, profile.pick(5.0, 15.0)))
    missed = {m: statistics.fmean(run["missed"] for run in runs[m]) for m in modes}
    if missed["nothing"] > QUIET_MISSED:
        reason = f"{missed['nothing']:.0%} of the frames are late without any training"
        raise CapabilityError("a quiet machine", reason, "Run it while nothing else runs")
    rates = {m: statistics.fmean(run["rate"] for run in runs[m]) for m in undisturbed}
    alone = {mode: statistics.fmean(undisturbed[mode]) for mode in undisturbed}
    reactions = [value for run in runs["swan"] for value in run["reactions_s"]]
    added = {mode: 100 * (missed[mode] - missed["nothing"]) for mode in undisturbed}
    return Claim(
        name="owner_experience",
        value=added["swan"],
        unit="percentage points of frames missed beyond those without training",
        better="lower",
        baseline=Baseline(name="greedy, all cores", value=added["greedy"]),
        samples={
            "missed": missed,
            "p99_late_ms": {
                m: statistics.fmean(run["p99_late_ms"] for run in runs[m]) for m in modes
            },
            "throughput_kept": {m: rates[m] / alone[m] for m in rates},
            "swan_over_best_undisturbed": rates["swan"] / max(alone.values()),
            "reaction_s": reactions,
            "bursts": sum(run["bursts"] for run in runs["swan"]),
            "added_points": added,
            "step_s": 1 / max(alone["swan"], 1e-9),
            "runs": runs,
            "undisturbed_steps_per_s": alone,
        },
    )


def _with_owner(mode: str, cycles: int) -> dict[str, Any]:
    """Train (or not) through so many bursts of frames."""
    with scratch.folder("swan") as folder:
        path = folder / "frames"
        with frames(path, ON_S, OFF_S) as begin, _trainer(mode) as (step, moves):
            _settle(mode, step)
            begin()
            steps, started_s = 0, time.monotonic()
            while time.monotonic() - started_s < cycles * (ON_S + OFF_S):
                steps += _advance(step)
            passed_s = time.monotonic() - started_s
            rows = [line.split() for line in path.read_text().splitlines()]
            bursts = [float(row[0]) for row in rows if row[2] == "1"]
            reactions = _reactions(bursts, moves)
    late = sorted(float(row[1]) for row in rows)
    return {
        "frames": len(late),
        "missed": sum(value > 0 for value in late) / max(len(late), 1),
        "p99_late_ms": 1000 * max(late[int(0.99 * (len(late) - 1))], 0.0) if late else 0.0,
        "rate": steps / passed_s,
        "reactions_s": reactions,
        "bursts": len(bursts),
        "moves": len(moves),
    }


def _alone(mode: str, seconds: float) -> float:
    """Steps per second without an owner."""
    with _trainer(mode) as (step, _):
        _settle(mode, step)
        steps, started_s = 0, time.monotonic()
        while time.monotonic() - started_s < seconds:
            steps += _advance(step)
        return steps / (time.monotonic() - started_s)


def _advance(step: Any) -> int:
    if step is None:
        time.sleep(0.05)
        return 0
    step()
    return 1


def _settle(mode: str, step: Any) -> None:
    """Warm caches; give Swan time to explore, which is measured by a claim of its own."""
    until_s = time.monotonic() + (4.0 if mode == "swan" else 1.0)
    while time.monotonic() < until_s:
        _advance(step)


@contextlib.contextmanager
def _trainer(mode: str) -> Iterator[tuple[Any, list[float]]]:
    """A step function (None for no training) and the times of Swan's moves."""
    moves: list[float] = []
    if mode == "nothing":
        yield None, moves
        return
    training = Training(NETWORK)
    if mode != "swan":
        before = torch.get_num_threads()
        apply_affinity(sorted(os.sched_getaffinity(0)))
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        training.step()  # all threads are there
        if mode == "greedy, nice":
            lower_priority(NICE)
        try:
            yield training.step, moves
        finally:
            torch.set_num_threads(before)
            restore_priority(0)
        return

    def note(event: dict[str, Any]) -> None:
        if event["kind"] == "move":
            moves.append(event["at_s"])

    # The owner's bursts last three seconds: patience of a phone's size would sleep through all.
    policy = Policy(controller=ControllerConfig(hold_s=1.0, undone_s=0.9, pause_after_s=0.0))
    config = EngineConfig(policy=policy)
    with Swan(config, on_event=note) as swan, swan.training(optimizer=training.optimizer):
        yield training.step, moves


def _reactions(bursts: list[float], moves: list[float]) -> list[float]:
    """Seconds from each burst's first frame to the first move after it, if within the burst."""
    found = []
    for burst_s in bursts:
        later = [moved_s - burst_s for moved_s in moves if 0 <= moved_s - burst_s <= ON_S]
        found += later[:1]
    return found
