"""Which training runs the claims of KGT need: methods per task, tuned rivals, fresh seeds.

Every (task, seed) is one piece in which all methods advance in turn, so a claim can be interrupted
between pieces and go on. Rivals are tuned to KGT's CPU time, on a seed that is not measured.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.bench.kgt import tasks
from jobs.bench.kgt.tasks import VANILLA, Method, Outcome, Task
from jobs.bench.pieces import Piece, measure_pieces
from raysys.bench import Profile

Runs = dict[str, list[Outcome]]

FIRST_SEED = 700  # no option was chosen on these seeds
TUNING_SEED = 99
CURVE_POINTS = 12
STATIC_DEPTHS = (4, 6)
_GRADIENT_PARTS = (4, 6, 8, 12)
_FIRST_TARGET = 0.5

PAPER: Mapping[str, Any] = {
    "scope": "frontmost", "unfreeze": "tenfold", "keep_thresholds": False, "window": 5, "every": 8,
    "min_epochs": 0,
}  # fmt: skip
ABLATION: Mapping[str, Mapping[str, Any]] = {
    "ours": {},
    "every module released": {"unfreeze": "tenfold"},
    "nothing released": {"unfreeze": "never"},
    "new thresholds": {"keep_thresholds": False},
    "frontmost module only": {"scope": "frontmost"},
    "no critical period": {"min_epochs": 0},
    "paper, W = 5, n = 8": PAPER,
}


def seeds(profile: Profile) -> list[int]:
    """Seeds of the measured runs."""
    return list(range(FIRST_SEED, FIRST_SEED + profile.pick(1, 5)))


def all_tasks(profile: Profile) -> list[Task]:
    """Both data sets with both schedules; the quick profile takes one."""
    schedules = profile.pick(("step",), ("step", "cosine"))
    makers = profile.pick((tasks.mnist1d,), (tasks.mnist1d, tasks.images))
    return [make(profile, schedule) for make in makers for schedule in schedules]


def run_seeds(
    task: Task, methods: Mapping[str, Method], profile: Profile, chosen: Sequence[int]
) -> Runs:
    """Outcomes of each method, one per seed."""
    pieces = [_piece(task, methods, profile, seed) for seed in chosen]
    found = [[Outcome(**row) for row in rows] for rows in measure_pieces(profile.partial, pieces)]
    return {name: [rows[index] for rows in found] for index, name in enumerate(methods)}


def _piece(task: Task, methods: Mapping[str, Method], profile: Profile, seed: int) -> Piece:
    def measure() -> list[dict[str, Any]]:
        points = profile.pick(1, CURVE_POINTS)
        found = tasks.side_by_side(task, methods, seed, curve_points=points)
        return [outcome.row() for outcome in found.values()]

    described = {name: method.key(task) for name, method in methods.items()}
    key = {**_task_key(task), "seed": seed, "methods": described}
    return Piece(f"{task.name}-{seed}", key, measure)


def _task_key(task: Task) -> dict[str, Any]:
    recipe = dataclasses.asdict(task.recipe)
    return {"task": task.name, "rows": len(task.split.train), "recipe": recipe}


def end_to_end(task: Task, profile: Profile) -> Runs:
    """Vanilla, KGT and KGT with cache on all seeds."""
    methods = {"vanilla": VANILLA, "kgt": Method("kgt", False), "kgt_cached": Method("kgt")}
    return run_seeds(task, methods, profile, seeds(profile))


def against_rivals(task: Task, profile: Profile) -> tuple[Runs, dict[str, Any]]:
    """KGT with cache beside its rivals, tuned to its CPU time; and what they were tuned to."""
    rivals, tuning = tuned_rivals(task, profile)
    found = run_seeds(task, {"kgt_cached": Method("kgt"), **rivals}, profile, seeds(profile))
    return found, tuning


def ablation(task: Task, profile: Profile) -> Runs:
    """KGT with one choice changed at a time, beside vanilla; all with cache."""
    names = list(ABLATION)[: profile.pick(2, None)]
    methods = {"vanilla": VANILLA, **{name: Method("kgt", True, ABLATION[name]) for name in names}}
    return run_seeds(task, methods, profile, seeds(profile)[:3])


def tuned_rivals(task: Task, profile: Profile) -> tuple[dict[str, Method], dict[str, Any]]:
    """Linear, static and gradient schedules whose CPU time comes close to KGT's.

    KGT's time differs from seed to seed, so the target is its median on the measured seeds, from
    the runs of :func:`end_to_end`; the rivals are tuned to it on a seed of their own.

    Returns:
        The rivals, and what was measured. One piece of the benchmark: starts come from measured
        costs, so a run that goes on must take those of its first part.
    """
    target = _FIRST_TARGET
    if profile.full:
        ours = end_to_end(task, profile)
        target = round(tasks.cpu_ratio(ours["kgt_cached"], ours["vanilla"]), 3)
    key = {**_task_key(task), "tuning": TUNING_SEED, "target": target, "profile": profile.name}
    measure = functools.partial(_tune if profile.full else _guess, task, target)
    (found,) = measure_pieces(profile.partial, [Piece(f"{task.name}-tuning", key, measure)])
    rivals = {name: Method(one["kind"], True, one["options"]) for name, one in found["to"].items()}
    return rivals, found


def _guess(task: Task, target: float) -> dict[str, Any]:
    """The quick profile's tuning: predicted, not measured."""
    rivals = _scheduled(task, dict.fromkeys(_schedules(), target))
    rivals["gradient"] = Method("gradient", True, {"interval": max(1, task.steps // 8)})
    return {"target_cpu_ratio": target, "measured": None, "to": _described(rivals)}


def _tune(task: Task, target: float) -> dict[str, Any]:
    """Run all rivals once on a seed that is not measured, then correct them.

    The first starts are predicted from the modules' costs; they are corrected by what was
    measured, and the gradient criterion's interval that came closest is taken.
    """
    tried = _scheduled(task, dict.fromkeys(_schedules(), target))
    intervals = {f"gradient_{n}": max(1, task.steps // n) for n in _GRADIENT_PARTS}
    tried |= {k: Method("gradient", True, {"interval": n}) for k, n in intervals.items()}
    outcomes = tasks.side_by_side(task, {"vanilla": VANILLA, **tried}, TUNING_SEED)
    ratio = {name: run.cpu_s / outcomes["vanilla"].cpu_s for name, run in outcomes.items()}
    rivals = _scheduled(task, {n: target * target / ratio[n] for n in _schedules()})
    closest = min(intervals, key=lambda name: abs(ratio[name] - target))
    rivals["gradient"] = tried[closest]
    return {"target_cpu_ratio": target, "measured": ratio, "to": _described(rivals)}


def _described(rivals: Mapping[str, Method]) -> dict[str, Any]:
    return {name: {"kind": m.kind, "options": dict(m.options)} for name, m in rivals.items()}


def _schedules() -> list[str]:
    return ["linear", *[f"static_{depth}" for depth in STATIC_DEPTHS]]


def _scheduled(task: Task, targets: Mapping[str, float]) -> dict[str, Method]:
    """Linear and static schedules predicted to take these shares of vanilla's CPU time."""
    found = {}
    for name, target in targets.items():
        kind, _, depth = name.partition("_")
        upto = int(depth or 0)
        options: dict[str, Any] = {"start": tasks.start_for(task, target, kind, upto)}
        if upto:
            options["upto"] = upto
        found[name] = Method(kind, True, options)
    return found
