"""Real threads on this host: is the choice that Swan settles on the fastest there is?"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from typing import Any

import torch

from actors.swan.affinity import apply_affinity
from actors.swan.discovery import discover, with_emulated_speeds
from actors.swan.engine import EngineConfig, Swan
from jobs.bench.swan.loads import burner
from jobs.bench.swan.networks import NETWORKS, Training
from raysys.bench import Baseline, Claim, Profile
from raysys.errors import CapabilityError
from raysys.federated.swan.choices import Choice, enumerate_choices, slowest_speed
from raysys.federated.swan.exploration import ExplorationConfig
from raysys.federated.swan.pilot import Policy
from raysys.federated.swan.topology import Topology

TOLERANCE = 0.05
MAX_STEPS = 200
SCENES = {"quiet": 0.0, "owner on one core": 0.6, "unequal cores": 0.5}


def real_choice(profile: Profile) -> Claim:
    """Share of trials whose chosen thread count is within 5 % of the best, timed side by side."""
    if len(os.sched_getaffinity(0)) < 2:
        raise CapabilityError("two cores", "this process may use one", "Run it on a larger host")
    trials: list[dict[str, Any]] = []
    before = torch.get_num_threads(), sorted(os.sched_getaffinity(0))
    try:
        for scene, share in SCENES.items():
            for name in NETWORKS:
                rounds = profile.pick(6, 12)
                repeats = range(profile.pick(1, 5))
                trials += [_trial(name, scene, share, repeat, rounds) for repeat in repeats]
    finally:
        torch.set_num_threads(before[0])
        apply_affinity(before[1])
    good = [trial["within"] for trial in trials]
    default = [trial["greedy_within"] for trial in trials]
    return Claim(
        name="real_choice",
        value=statistics.fmean(good),
        unit="share of trials within 5 % of the best",
        better="higher",
        baseline=Baseline(name="all cores, PyTorch's default", value=statistics.fmean(default)),
        ratio=statistics.fmean(good) / max(statistics.fmean(default), 1e-9),
        samples={"trials": trials, "mean_gap": statistics.fmean(t["gap"] for t in trials)},
    )


def _trial(name: str, scene: str, share: float, repeat: int, rounds: int) -> dict[str, Any]:
    """Let Swan choose under a load, then time every choice by turns under the same load."""
    topology = _topology(scene, share)
    training = Training(name)
    training.step()
    loaded = topology.clusters[0].cores[-1] if scene == "unequal cores" else topology.cores[-1]
    load = burner(loaded, share) if share else contextlib.nullcontext()
    with load:
        picked, steps = _chosen(training, topology)
        times = _times(training, topology, loaded if share else -1, rounds)
    best = min(times.values())
    gap = times[picked.counts] / best - 1
    most = max(times, key=sum)
    greedy_gap = times[most] / best - 1
    return {
        "network": name,
        "scene": scene,
        "repeat": repeat,
        "threads": picked.threads,
        "explored_steps": steps,
        "gap": gap,
        "within": float(gap <= TOLERANCE),
        "greedy_gap": greedy_gap,
        "greedy_within": float(greedy_gap <= TOLERANCE),
        "ms": {"+".join(map(str, counts)): 1000 * value for counts, value in times.items()},
    }


def _topology(scene: str, share: float) -> Topology:
    """The host; in the emulated scene the burdened core is presented as slower."""
    topology = discover(allowed=sorted(os.sched_getaffinity(0))[:2])
    if scene != "unequal cores":
        return topology
    first, last = topology.cores[0], topology.cores[-1]
    return with_emulated_speeds(topology, {first: 1.0, last: 1.0 - share})


def _chosen(training: Training, topology: Topology) -> tuple[Choice, int]:
    """Run steps under the engine until it has settled."""
    policy = Policy(exploration=ExplorationConfig(min_s=0.2))
    config = EngineConfig(policy=policy, nice=0)
    with Swan(config, topology=topology) as swan:
        with swan.training(optimizer=training.optimizer) as task:
            while swan.pilot.exploring and task.steps < MAX_STEPS:
                training.step()
            # The load may need a moment to be told from our own threads.
            settled_s = time.monotonic()
            while time.monotonic() - settled_s < 1.0:
                training.step()
        choice = swan.pilot.choice or swan.pilot.profile.choices[0]
        return choice, swan.pilot.exploration_steps


def _times(
    training: Training, topology: Topology, loaded: int, rounds: int
) -> dict[tuple[int, ...], float]:
    """Median step of every choice, on its quietest cores, the choices taking turns."""
    choices = [_quiet(choice, topology, loaded) for choice in enumerate_choices(topology)]
    found: dict[tuple[int, ...], list[float]] = {choice.counts: [] for choice in choices}
    for _ in range(rounds):
        for choice in choices:
            apply_affinity(choice.cores)
            torch.set_num_threads(choice.threads)
            apply_affinity(choice.cores)
            training.step()
            started_s = time.perf_counter()
            training.step()
            training.step()
            found[choice.counts].append((time.perf_counter() - started_s) / 2)
    return {counts: statistics.median(times) for counts, times in found.items()}


def _quiet(choice: Choice, topology: Topology, loaded: int) -> Choice:
    """The choice on cores without the load, where it can be."""
    if slowest_speed(choice, topology) < 1 or len(topology.clusters) > 1:
        return choice
    order = sorted(topology.cores, key=lambda core: (core == loaded, core))
    return Choice(choice.counts, tuple(order[: choice.threads]))
