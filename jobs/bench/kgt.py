"""What knowledge-guided layer freezing saves, and what it costs, measured side by side."""

from __future__ import annotations

import functools
import statistics
from typing import Any

from jobs.bench import kgt_system as system
from jobs.bench import kgt_tasks as tasks
from raysys.bench import Baseline, Claim, Profile, paired_claim

CONFIG = {
    "tasks": "MNIST-1D (1-D ResNet, 7 modules) and Fashion-MNIST at 14 x 14 (2-D ResNet)",
    "kgt_options": dict(tasks.KGT_OPTIONS),
    "clock": "process CPU seconds, one torch thread, methods advance in turn epoch by epoch",
    "step_ratio": "ResNet-20, 28 x 28 x 1, batch 64",
}
_POINTS_BELOW_STATIC = 0.5


def _seeds(profile: Profile) -> list[int]:
    return list(range(200, 200 + profile.pick(1, 5)))


@functools.cache
def _runs(task: tasks.Task, profile: Profile) -> dict[str, list[tasks.Outcome]]:
    """Vanilla, KGT and KGT with cache on all seeds."""
    methods = {"vanilla": tasks.vanilla, "kgt": tasks.kgt(False), "kgt_cached": tasks.kgt(True)}
    found: dict[str, list[tasks.Outcome]] = {name: [] for name in methods}
    for seed in _seeds(profile):
        for name, outcome in tasks.side_by_side(task, methods, seed).items():
            found[name].append(outcome)
    return found


def _tasks(profile: Profile) -> list[tasks.Task]:
    schedules = profile.pick(("step",), ("step", "cosine"))
    makers = profile.pick((tasks.mnist1d,), (tasks.mnist1d, tasks.images))
    return [make(profile, schedule) for make in makers for schedule in schedules]


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
    for task in _tasks(profile):
        runs = _runs(task, profile)
        base = runs["vanilla"]
        table.append(
            {
                "task": task.name,
                "cpu_ratio": tasks.cpu_ratio(runs["kgt"], base),
                "cpu_ratio_cached": tasks.cpu_ratio(runs["kgt_cached"], base),
                "vanilla_points": tasks.mean_points(base),
                "kgt_minus_vanilla_points": tasks.mean_points(runs["kgt"])
                - tasks.mean_points(base),
                "cached_minus_vanilla_points": tasks.mean_points(runs["kgt_cached"])
                - tasks.mean_points(base),
                "runs": [outcome.row() for many in runs.values() for outcome in many],
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
        seeds=_seeds(profile),
    )


def against_baselines(profile: Profile) -> Claim:
    """The smallest margin in points over baselines tuned to KGT's CPU time (static: less 0.5)."""
    task = tasks.mnist1d(profile, "step")
    target = tasks.cpu_ratio(_runs(task, profile)["kgt_cached"], _runs(task, profile)["vanilla"])
    starts = {kind: tasks.start_for(task, target, kind) for kind in ("linear", "static")}
    interval = _gradient_interval(task, target, profile)
    methods = {
        "kgt_cached": tasks.kgt(True),
        "linear": tasks.linear(starts["linear"]),
        "static": tasks.static(starts["static"]),
        "gradient": tasks.gradient(interval),
    }
    found: dict[str, list[tasks.Outcome]] = {name: [] for name in methods}
    for seed in _seeds(profile):
        for name, outcome in tasks.side_by_side(task, methods, seed).items():
            found[name].append(outcome)
    points = {name: tasks.mean_points(many) for name, many in found.items()}
    ours = points["kgt_cached"]
    margins = {name: ours - points[name] for name in ("linear", "gradient", "static")}
    value = min(margins["linear"], margins["gradient"], margins["static"] - _POINTS_BELOW_STATIC)
    cpu = {name: tasks.cpu_ratio(many, found["kgt_cached"]) for name, many in found.items()}
    tuned = {**starts, "gradient_interval": interval, "target_cpu_ratio": target}
    return Claim(
        name="against_baselines",
        value=value,
        unit="points",
        better="higher",
        baseline=Baseline(name="best rival, points", value=max(points[n] for n in margins)),
        samples={
            "points": points,
            "margins": margins,
            "cpu_over_kgt": cpu,
            "tuned": tuned,
            "runs": [outcome.row() for many in found.values() for outcome in many],
        },
        seeds=_seeds(profile),
    )


def _gradient_interval(task: tasks.Task, target: float, profile: Profile) -> int:
    """The interval whose CPU time on a seed of its own comes closest to the target."""
    total = task.recipe.epochs * (len(task.split.train) // task.recipe.batch_size)
    if not profile.full:
        return max(1, total // 8)
    methods: dict[str, tasks.Method] = {"vanilla": tasks.vanilla}
    methods |= {str(total // parts): tasks.gradient(total // parts) for parts in (4, 8, 16)}
    found = tasks.side_by_side(task, methods, seed=99)
    base = found.pop("vanilla")
    return int(min(found, key=lambda name: abs(found[name].cpu_s / base.cpu_s - target)))


def overhead(profile: Profile) -> Claim:
    """Share of a run's CPU time that reference and plasticity take, at n = 18 and at n = 8."""
    task = tasks.mnist1d(profile, "step")
    methods = {
        "n18": tasks.kgt(False, every=18, scope="frontmost"),
        "n8": tasks.kgt(False, every=8, scope="frontmost"),
        "n18_all": tasks.kgt(False, every=18),
        "n12_all": tasks.kgt(False),
    }
    if not profile.full:
        methods = {name: methods[name] for name in ("n18", "n8")}
    found = tasks.side_by_side(task, methods, _seeds(profile)[0])
    share = {name: outcome.evaluation_s / outcome.cpu_s for name, outcome in found.items()}
    return Claim(
        name="overhead",
        value=100 * share["n18"],
        unit="% of CPU time at n = 18",
        better="lower",
        samples={name: 100 * value for name, value in share.items()},
        seeds=_seeds(profile)[:1],
    )


def stopped_controller(profile: Profile) -> Claim:
    """Step time while the controller is stopped (SIGSTOP) over step time while it runs."""
    stopped, running, longest = system.stopped_controller(seconds=profile.pick(6.0, 30.0))
    claim = paired_claim(
        "stopped_controller",
        "s per step",
        "lower",
        ours=[statistics.median(stopped)],
        baseline_name="controller running",
        baseline=[statistics.median(running)],
    )
    extra: dict[str, Any] = {
        "longest_control_call_s": longest,
        "steps_stopped": len(stopped),
        "steps_running": len(running),
    }
    import dataclasses

    return dataclasses.replace(claim, samples=extra)


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
    "overhead": overhead,
    "resume_equal": resume_equal,
    "kgt_on_coreset": kgt_on_coreset,
    "stopped_controller": stopped_controller,
}
