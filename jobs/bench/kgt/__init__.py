"""What knowledge-guided layer freezing saves, and what it costs, measured side by side."""

from __future__ import annotations

import statistics
from typing import Any

from jobs.bench.kgt import runs, system, tasks
from jobs.bench.kgt import stopped as stopping
from raysys.bench import Baseline, Claim, Profile

CONFIG = {
    "tasks": "MNIST-1D (1-D ResNet), Fashion-MNIST at 14 x 14 (2-D ResNet); 7 layer modules",
    "kgt_options": dict(tasks.KGT_OPTIONS),
    "clock": "process CPU seconds, one torch thread, methods advance in turn epoch by epoch",
    "step_ratio": "ResNet-20, 28 x 28 x 1, batch 64",
}
_POINTS_BELOW_STATIC = 0.5


def frozen_stage1_cached(profile: Profile) -> Claim:
    """ResNet-20 step with stage 1 read from the cache against the full step."""
    return _frozen("frozen_stage1_cached", "blocks.2", profile)


def frozen_stage2_cached(profile: Profile) -> Claim:
    """ResNet-20 step with stages 1 and 2 read from the cache against the full step."""
    return _frozen("frozen_stage2_cached", "blocks.5", profile)


def _frozen(name: str, last: str, profile: Profile) -> Claim:
    full, frozen = system.step_times(last, repeats=profile.pick(7, 15))
    ratios = [whole / part for whole, part in zip(full, frozen)]
    return Claim(
        name=name,
        value=statistics.median(ratios),
        unit="x full step",
        better="higher",
        baseline=Baseline(name="full step, CPU seconds", value=statistics.median(full)),
        ratio=statistics.median(ratios),
        samples={"full_s": full, "frozen_s": frozen, "ratio": ratios},
    )


def end_to_end(profile: Profile) -> Claim:
    """CPU time of KGT with cache over vanilla's, the worst of all tasks; accuracies beside it."""
    table = []
    for task in runs.all_tasks(profile):
        found = runs.end_to_end(task, profile)
        base = found["vanilla"]
        table.append(
            {
                "task": task.name,
                "cpu_ratio": tasks.cpu_ratio(found["kgt"], base),
                "cpu_ratio_cached": tasks.cpu_ratio(found["kgt_cached"], base),
                "vanilla_points": tasks.mean_points(base),
                "kgt_minus_vanilla_points": tasks.mean_points(found["kgt"])
                - tasks.mean_points(base),
                "cached_minus_vanilla_points": tasks.mean_points(found["kgt_cached"])
                - tasks.mean_points(base),
                "runs": _rows(found),
            }
        )
    worst = max(float(row["cpu_ratio_cached"]) for row in table)  # type: ignore[arg-type]
    return Claim(
        name="end_to_end",
        value=worst,
        unit="CPU time of vanilla",
        better="lower",
        baseline=Baseline(name="vanilla", value=1.0),
        ratio=worst,
        samples=table,
        seeds=runs.seeds(profile),
    )


def _rows(found: runs.Runs) -> list[dict[str, Any]]:
    return [outcome.row() for outcomes in found.values() for outcome in outcomes]


def against_baselines(profile: Profile) -> Claim:
    """The smallest margin in points over baselines tuned to KGT's CPU time (static: less 0.5)."""
    table = [_against_rivals(task, profile) for task in runs.all_tasks(profile)]
    value, best = min((_smallest_margin(row), row["best_rival_points"]) for row in table)
    return Claim(
        name="against_baselines",
        value=value,
        unit="points, the smallest margin",
        better="higher",
        baseline=Baseline(name="best rival of that task, points", value=best),
        samples=table,
        seeds=runs.seeds(profile),
    )


def _against_rivals(task: tasks.Task, profile: Profile) -> dict[str, Any]:
    found, tuning = runs.against_rivals(task, profile)
    points = {name: tasks.mean_points(outcomes) for name, outcomes in found.items()}
    margins = {n: points["kgt_cached"] - points[n] for n in found if n != "kgt_cached"}
    return {
        "task": task.name,
        "points": points,
        "best_rival_points": max(points[name] for name in margins),
        "margins": margins,
        "cpu_over_kgt": {n: tasks.cpu_ratio(m, found["kgt_cached"]) for n, m in found.items()},
        "tuning": tuning,
        "runs": _rows(found),
    }


def _smallest_margin(row: dict[str, Any]) -> float:
    margins: dict[str, float] = row["margins"]
    return min(
        margin - _POINTS_BELOW_STATIC * name.startswith("static")
        for name, margin in margins.items()
    )


def ablation(profile: Profile) -> Claim:
    """Accuracy of KGT minus that of its best variant with one choice changed, in points."""
    found = runs.ablation(tasks.mnist1d(profile, "step"), profile)
    base = found.pop("vanilla")
    table = {
        name: {
            "points": tasks.mean_points(outcomes),
            "minus_vanilla_points": tasks.mean_points(outcomes) - tasks.mean_points(base),
            "cpu_ratio": tasks.cpu_ratio(outcomes, base),
        }
        for name, outcomes in found.items()
    }
    ours = table.pop("ours")
    best = max(table, key=lambda name: table[name]["points"])
    return Claim(
        name="ablation",
        value=ours["points"] - table[best]["points"],
        unit="points",
        better="higher",
        baseline=Baseline(name=best, value=table[best]["points"]),
        samples={"ours": ours, **table, "runs": _rows(found)},
        seeds=[outcome.seed for outcome in base],
    )


def overhead(profile: Profile) -> Claim:
    """Share of a run's CPU time that reference and plasticity take, at n = 18 and at n = 8."""
    task = tasks.mnist1d(profile, "step")
    every = {"n18": 18, "n8": 8}
    methods = {
        name: tasks.Method("kgt", False, {"every": n, "scope": "frontmost"})
        for name, n in every.items()
    }
    if profile.full:
        methods["n18_all"] = tasks.Method("kgt", False, {"every": 18})
        methods["n12_all"] = tasks.Method("kgt", False)
    found = runs.run_seeds(task, methods, profile, runs.seeds(profile)[:1])
    share = {name: run.evaluation_s / run.cpu_s for name, (run,) in found.items()}
    return Claim(
        name="overhead",
        value=100 * share["n18"],
        unit="% of CPU time at n = 18",
        better="lower",
        samples={name: 100 * value for name, value in share.items()},
        seeds=runs.seeds(profile)[:1],
    )


def stopped_controller(profile: Profile) -> Claim:
    """Step time with the controller stopped (SIGSTOP) over a control's, step by step in turn."""
    stopped, calm, longest = stopping.stopped_controller(seconds=profile.pick(8.0, 30.0))
    return Claim(
        name="stopped_controller",
        value=stopped.ratio(0),
        unit="x step of an undisturbed training",
        better="lower",
        baseline=Baseline(name="the same with both controllers running", value=calm.ratio(0)),
        ratio=stopped.ratio(0) / calm.ratio(0),
        samples={
            "stopped": stopped.row(),
            "running": calm.row(),
            "longest_control_call_s": longest,
        },
    )


def resume_equal(profile: Profile) -> Claim:
    """Share of killed and resumed runs whose final weights are bit-identical."""
    rows = system.resume_runs(kills=profile.pick(2, 4))
    equal = sum(row["identical"] for row in rows)
    return Claim(
        name="resume_equal",
        value=equal / len(rows),
        unit="share of runs",
        better="higher",
        samples=rows,
    )


def kgt_on_coreset(profile: Profile) -> Claim:
    """CPU time of KGT with cache on a CCS coreset over vanilla training on all examples."""
    rows = system.coreset_runs(profile)
    ratio = statistics.median(row["cpu_ratio"] for row in rows)
    return Claim(
        name="kgt_on_coreset",
        value=ratio,
        unit="CPU time of vanilla on all data",
        better="lower",
        baseline=Baseline(name="vanilla on all data", value=1.0),
        ratio=ratio,
        samples=rows,
    )


CLAIMS = {
    "frozen_stage1_cached": frozen_stage1_cached,
    "frozen_stage2_cached": frozen_stage2_cached,
    "end_to_end": end_to_end,
    "against_baselines": against_baselines,
    "ablation": ablation,
    "overhead": overhead,
    "resume_equal": resume_equal,
    "kgt_on_coreset": kgt_on_coreset,
    "stopped_controller": stopped_controller,
}
