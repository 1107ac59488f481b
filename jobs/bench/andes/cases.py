"""Simulator runs for the Andes benchmark: named cases, run in two processes, remembered.

A case is everything that decides a run; equal cases are simulated once, whichever claim asks.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from raysys import machine
from raysys.errors import ConfigError
from raysys.serving.andes import simulator
from raysys.serving.andes.controller import ControllerConfig
from raysys.serving.andes.models import StepTime
from raysys.serving.andes.planner import PlannerConfig
from raysys.serving.andes.scheduler import AndesConfig
from raysys.serving.andes.simulator import workload as workloads
from raysys.serving.andes.simulator.engine import EngineConfig, Policy, SimEngine
from raysys.serving.andes.simulator.policies import BASELINES, Andes, policy_named
from raysys.serving.andes.simulator.result import simulate

# Step times of three machines; "base" is the one that the paper-sized figures refer to. "speed" is
# the machine's throughput relative to base, by which rates are scaled.
MACHINES: dict[str, StepTime] = {
    "fast": StepTime(base_s=0.02, per_sequence_s=0.0002, per_prefill_token_s=1 / 20000),
    "base": StepTime(base_s=0.05, per_sequence_s=0.0005, per_prefill_token_s=1 / 8000),
    "slow": StepTime(base_s=0.15, per_sequence_s=0.002, per_prefill_token_s=1 / 4000),
}
SPEED = {"fast": 2.2, "base": 1.0, "slow": 0.33}
CHEAP_RESTORE = 0.1
AZURE = "azure-llm-2023/AzureLLMInferenceTrace_conv.csv"

# Studies: one part of the planner changed at a time.
ABLATIONS: dict[str, dict[str, Any]] = {
    "andes": {},
    "no refiner": {"refiner": False},
    "no victim gate": {"gate": False},
    "no division by length": {"per_length": False},
    "stop at the first misfit": {"skip_misfits": False},
    "waiting requests not charged": {"charge_waiting": False},
    "Qwait frozen at the current QoE": {"frozen_wait": True},
    "exact packing": {"solver": "exact"},
    "never pauses": {"max_preemptions": 0},
    "horizon 10 s": {"horizon_s": 10.0},
    "horizon 25 s": {"horizon_s": 25.0},
    "horizon 100 s": {"horizon_s": 100.0},
    "objective maxmin": {"objective": "maxmin"},
    "objective perfect": {"objective": "perfect"},
    "objective tail": {"objective": "tail"},
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One run.

    Args:
        load: ``"cyclic"``, ``"poisson"``, ``"random"`` (bursts) or ``"azure"``.
        rate: requests per second; for ``"azure"`` the share of the trace that is kept.
        seed: of arrivals, lengths and readers, or of the thinning.
        duration_s: length of the arrival process, or of the part of the trace; a cyclic load has
            one cycle in it.
        policy: a baseline, ``"fcfs_prefill_first"``, or a key of :data:`ABLATIONS`.
        machine: a key of :data:`MACHINES`.
        cheap: restoring costs a tenth of recomputing.
        controller: whether the do-no-harm controller is on.
    """

    load: str
    rate: float
    seed: int
    duration_s: float = 1200.0
    policy: str = "andes"
    machine: str = "base"
    cheap: bool = False
    controller: bool = True


class TimedAndes(Andes):
    """Andes that also measures its own processor time."""

    plan_s = 0.0

    def before_step(self, engine: SimEngine) -> None:
        started = time.thread_time()
        super().before_step(engine)
        self.plan_s += time.thread_time() - started


def make_workload(case: Case) -> workloads.Workload:
    """Build the case's workload; the Azure trace falls back to a generated look-alike."""
    if case.load == "poisson":
        return workloads.poisson(case.rate, case.duration_s, case.seed)
    if case.load == "cyclic":
        return workloads.cyclic_bursts(
            case.rate, case.duration_s, case.seed, cycle_s=case.duration_s
        )
    if case.load == "random":
        return workloads.random_bursts(case.rate, case.duration_s, case.seed, bursts_per_hour=9)
    if case.load == "azure":
        return azure_trace().first(case.duration_s).thinned(case.rate, case.seed)
    raise ConfigError("load", case.load, "cyclic, poisson, random or azure")


@functools.cache
def azure_trace() -> workloads.Workload:
    """The Azure conversation trace, or generated requests with its published statistics."""
    folder = machine.data_dir()
    path = None if folder is None else folder / AZURE
    if path is not None and path.is_file():
        return workloads.load_azure(path)
    return workloads.azure_like(5.5, 3480.0, seed=0)


def make_policy(case: Case) -> Policy:
    """Build the case's policy with the machine's step time as the latency model's seed."""
    if case.policy in BASELINES:
        return policy_named(case.policy)
    if case.policy == "fcfs_prefill_first":
        return policy_named("fcfs")
    step_time = MACHINES[case.machine]
    swap = step_time.per_prefill_token_s * CHEAP_RESTORE if case.cheap else None
    config = AndesConfig(
        planner=PlannerConfig(**ABLATIONS[case.policy]),
        controller=ControllerConfig(enabled=case.controller),
        step_time=step_time,
        swap_per_token_s=swap,
    )
    return TimedAndes(config, name=case.policy)


def run_case(case: Case) -> dict[str, float]:
    """Simulate one case; returns its figures."""
    policy = make_policy(case)
    config = EngineConfig(
        step_time=MACHINES[case.machine],
        chunked=case.policy != "fcfs_prefill_first",
        restore_fraction=CHEAP_RESTORE if case.cheap else 1.0,
    )
    result = simulate(make_workload(case), config, policy)
    row = result.row()
    row["requests"] = float(result.qoe.size)
    row["steps"] = float(result.stats.steps)
    if isinstance(policy, TimedAndes):
        row["plan_share"] = policy.plan_s / result.stats.busy_s
        row["plans"] = float(policy.scheduler.counters.plans)
    return row


def source_digest() -> str:
    """Names the code that decides a run's figures: the core, the simulator and this file."""
    folder = Path(simulator.__file__).parent.parent
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Simulations:
    """Runs cases in parallel and remembers them."""

    def __init__(self) -> None:
        self._known: dict[Case, dict[str, float]] = {}
        self._pool: ProcessPoolExecutor | None = None
        self._file: Path | None = None

    def keep(self, folder: Path | None = None) -> None:
        """Keep results on disk from now on, and take those of an interrupted run of this code."""
        if self._file is not None:
            return
        folder = folder or machine.cache_dir() / "bench"
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / f"andes-{source_digest()}.jsonl"
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        for line in lines:
            try:
                kept = json.loads(line)
            except ValueError:  # cut off when the run was killed
                continue
            self._known.setdefault(Case(**kept["case"]), kept["figures"])

    def run(self, cases: Sequence[Case]) -> list[dict[str, float]]:
        """Figures of the cases, in order."""
        new = [case for case in dict.fromkeys(cases) if case not in self._known]
        if len(new) == 1:
            self._note(new[0], run_case(new[0]))
        elif new:
            for case, figures in zip(new, self._workers().map(run_case, new)):
                self._note(case, figures)
        return [self._known[case] for case in cases]

    def _note(self, case: Case, figures: dict[str, float]) -> None:
        self._known[case] = figures
        if self._file is not None:
            line = json.dumps({"case": dataclasses.asdict(case), "figures": figures})
            with self._file.open("a") as out:
                out.write(line + "\n")

    def mean(self, cases: Sequence[Case], figure: str) -> float:
        """Mean of one figure over the cases."""
        rows = self.run(cases)
        return sum(row[figure] for row in rows) / len(rows)

    def _workers(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            workers = min(2, machine.available_cores())
            self._pool = ProcessPoolExecutor(workers, mp_context=context)
            atexit.register(self._pool.shutdown)
        return self._pool


def crossing(
    evaluate: Callable[[float], float], low: float, high: float, level: float, rounds: int
) -> tuple[float, dict[float, float]]:
    """Where a falling curve crosses ``level``, by bracketing and linear interpolation.

    Args:
        evaluate: the curve.
        low, high: first guess of a bracket; it is moved while both ends lie on one side.
        rounds: refinements after the bracket is found.

    Returns:
        The crossing, and every evaluated point.
    """
    points: dict[float, float] = {}

    def at(x: float) -> float:
        x = round(x, 4)
        if x not in points:
            points[x] = evaluate(x)
        return points[x]

    for _ in range(8):
        if at(low) < level:
            low, high = low * 0.8, low
        elif at(high) >= level:
            low, high = high, high * 1.2
        else:
            break
    middle = low
    for _ in range(rounds + 1):
        upper, lower = at(low), at(high)
        middle = round(low + (high - low) * (upper - level) / max(1e-9, upper - lower), 4)
        if _ == rounds:
            break
        low, high = (middle, high) if at(middle) >= level else (low, middle)
    return middle, dict(sorted(points.items()))
