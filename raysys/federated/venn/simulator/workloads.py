"""The nine published workloads, at full size and scaled (paper, section 5.1; public program).

33 kinds of jobs as (participants, rounds, deadline). The scaled form divides participants, device
population, rounds and arrival gaps so that the dynamics of a round stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raysys.config import check_choice, check_range
from raysys.federated.venn.simulator.jobs import SimConfig, SimJob

_FAMILY = (930, 980, 1280, 1620, 530, 1900, 1750, 1800, 1360, 1600, 1290, 1980, 640)
JOB_KINDS: tuple[tuple[int, int, int], ...] = (
    (1500, 856, 1000),
    (500, 2568, 1000),
    (750, 1712, 1000),
    (100, 1000, 300),
    (100, 2000, 300),
    (100, 3000, 300),
    (100, 4000, 300),
    (200, 1000, 600),
    (200, 2000, 600),
    (200, 3000, 600),
    (800, 1000, 1000),
    (200, 1000, 600),
    (400, 1000, 1000),
    (32, 1463, 300),
    (64, 1463, 300),
    (128, 1463, 300),
    (20, 2000, 300),
    (50, 2000, 300),
    (200, 2000, 600),
    (500, 2000, 1000),
    *((500, rounds, 1000) for rounds in _FAMILY),
)
GROUP_NAMES = ("general", "compute-rich", "memory-rich", "high-performance")
_EVERY = tuple(range(1, 34))
_SMALL = (*range(4, 11), *range(12, 20), 21, 22, 25, 33)
_LARGE = (1, 2, 3, 11, 20, 23, 24, *range(26, 33))
_LOW = (4, 5, 8, 12, *range(14, 19))
_HIGH = (1, 2, 3, 11, 13, *range(20, 34))

# name -> kinds, seed of the authors, repeats of the period, favoured class (None: class i mod 4)
_TABLE: dict[str, tuple[tuple[int, ...], int, int, int | None]] = {
    "even": (_EVERY, 10, 30, None),
    "small": (_SMALL, 10, 20, None),
    "large": (_LARGE, 10, 50, None),
    "low": (_LOW, 10, 10, None),
    "high": (_HIGH, 10, 50, None),
    "general": (_EVERY, 2, 20, 0),
    "compute": (_EVERY, 2, 25, 1),
    "memory": (_EVERY, 2, 30, 2),
    "resource": (_EVERY, 2, 35, 3),
}
STANDARD = ("even", "small", "large", "low", "high")
BIASED = ("general", "compute", "memory", "resource")


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkloadConfig:
    """Which workload to draw.

    Args:
        name: one of the nine.
        seed: of the draws; None takes the authors' seed of this workload.
        jobs: number of jobs.
        mean_gap_s: mean of the exponential gaps between arrivals, before scaling.
        first_s: arrival of the first job, before scaling.
        scale_devices: divides participants (at least two remain).
        scale_rounds: divides rounds and gaps.
        bias: share of jobs in the favoured class of a biased workload: 0.7 (configuration files of
            the public program) or 0.5 (text of the paper); the rest is split evenly.
        buffered_share: share of jobs that run as buffered asynchronous jobs.
    """

    name: str = "even"
    seed: int | None = None
    jobs: int = 50
    mean_gap_s: float = 1800.0
    first_s: float = 3600.0
    scale_devices: float = 10.0
    scale_rounds: float = 20.0
    bias: float = 0.7
    buffered_share: float = 0.0

    def __post_init__(self) -> None:
        check_choice(self, "name", tuple(_TABLE))
        check_range(self, "jobs", 1)
        check_range(self, "mean_gap_s", 0, low_open=True)
        check_range(self, "first_s", 0)
        check_range(self, "scale_devices", 1)
        check_range(self, "scale_rounds", 1)
        check_choice(self, "bias", (0.5, 0.7))
        check_range(self, "buffered_share", 0, 1)


@dataclass(frozen=True, slots=True)
class Workload:
    """Jobs of one draw, and the repeats of the period that the authors allow them."""

    name: str
    jobs: tuple[SimJob, ...]
    repeats: int
    seed: int

    def config(self, **changes: object) -> SimConfig:
        """Semantics of the public program with this workload's repeats and seed.

        Twice the repeats plus two: the slow policies need them, the fast ones stop earlier anyway.
        """
        values: dict[str, object] = {"repeats": 4 * self.repeats, "seed": self.seed, **changes}
        return SimConfig(**values)  # type: ignore[arg-type]


def make_workload(config: WorkloadConfig) -> Workload:
    """Draw kinds, classes and arrivals of a workload."""
    kinds, authors_seed, repeats, favoured = _TABLE[config.name]
    seed = authors_seed if config.seed is None else config.seed
    generator = np.random.default_rng(seed)
    chosen = generator.choice(np.asarray(kinds), size=config.jobs)
    gaps = generator.exponential(config.mean_gap_s / config.scale_rounds, size=config.jobs)
    arrivals = config.first_s / config.scale_rounds + np.cumsum(gaps) - gaps[0]
    classes = _classes(config, favoured, generator)
    buffered = generator.random(config.jobs) < config.buffered_share
    jobs = []
    for kind, arrival_s, group, is_buffered in zip(chosen, arrivals, classes, buffered):
        participants, rounds, deadline_s = JOB_KINDS[int(kind) - 1]
        size = max(round(participants / config.scale_devices), min(2, participants))
        jobs.append(
            SimJob(
                group=int(group),
                participants=size,
                rounds=max(round(rounds / config.scale_rounds), 1),
                arrival_s=float(arrival_s),
                deadline_s=float(deadline_s),
                kind="buffered" if is_buffered else "sync",
                buffer=max(round(0.8 * size), 1),
            )
        )
    return Workload(config.name, tuple(jobs), repeats, seed)


def _classes(
    config: WorkloadConfig, favoured: int | None, generator: np.random.Generator
) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    if favoured is None:
        return np.arange(config.jobs, dtype=np.int64) % len(GROUP_NAMES)
    others = (1.0 - config.bias) / (len(GROUP_NAMES) - 1)
    shares = np.full(len(GROUP_NAMES), others)
    shares[favoured] = config.bias
    return generator.choice(len(GROUP_NAMES), size=config.jobs, p=shares)
