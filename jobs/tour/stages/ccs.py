"""Coverage-centric coresets: a tenth of the data, chosen three ways, same training."""

from __future__ import annotations

import dataclasses

import numpy as np

from actors.ccs import row_finder, train_many
from jobs.bench.ccs.lab import score_task
from jobs.bench.ccs.tasks import Task, signal_task, small_task
from jobs.coreset.report import kept_plot
from jobs.tour.stage import Row, Stage, StageContext, StageResult
from raysys.training.ccs.baselines import CCS, HardestFirst, Method, Random
from raysys.training.ccs.coverage import coverage
from raysys.training.ccs.selection import default_beta

PRUNED = 0.9


def run(context: StageContext) -> StageResult:
    """Score once, select a tenth with each method, train two proxies on each, compare."""
    import ray

    task = _task(context.smoke)
    train, test = task.split.train, task.split.test
    context.progress(0, 3, "scoring run on all the data")
    scoring = ray.remote(num_cpus=1)(score_task)
    scored = ray.get(scoring.remote(train, test, task.proxy, context.seed))
    table, m = scored.table, round((1 - PRUNED) * len(train))
    methods: dict[str, Method] = {
        "CCS": CCS(default_beta(PRUNED)),
        "random": Random(),
        "hardest by AUM": HardestFirst("aum"),
    }
    kept = {name: method.select(table, m, context.seed) for name, method in methods.items()}
    context.progress(1, 3, f"training on {m} of {len(train)} examples")
    find = row_finder(train.ids)
    seeds = [context.seed + offset for offset in range(1 if context.smoke else 3)]
    subsets = [find(ids) for ids in kept.values() for _ in seeds]
    found = train_many(train, subsets, seeds * len(kept), test, task.proxy, stack=len(seeds) + 2)
    means = dict(zip(kept, 100 * np.asarray(found).reshape(len(kept), -1).mean(1)))
    context.progress(2, 3, "coverage")
    features = table.need_features("coverage")
    covered = {
        name: coverage(features[table.rows_of(ids)], scored.test_features[:1000]).auc_pr
        for name, ids in kept.items()
    }
    context.progress(3, 3, "done")
    rows = [
        Row(
            measure=f"test accuracy, 90 % pruned ({task.name})", unit="%", better="higher",
            baseline_name=name, baseline=float(means[name]), ours=float(means["CCS"]),
        )
        for name in ("random", "hardest by AUM")
    ]  # fmt: skip
    rows.append(
        Row(
            measure="AUC_pr, distance to the nearest kept example", unit="feature units",
            better="lower", baseline_name="hardest by AUM",
            baseline=covered["hardest by AUM"], ours=covered["CCS"],
        )
    )  # fmt: skip
    shown = {name: kept[name] for name in ("CCS", "hardest by AUM")}
    return StageResult(
        rows=rows,
        plots=[kept_plot(table, shown)],
        notes=[
            f"All {len(train)} examples: {100 * scored.full_accuracy:.1f} %. "
            f"{len(seeds)} proxies per method, beta {default_beta(PRUNED):.2f} (the default).",
            "AUC_pr shows poor coverage; it does not rank CCS above random.",
        ],
    )


def _task(smoke: bool) -> Task:
    if smoke:
        return small_task()
    task = signal_task(train_rows=6000, test_rows=2000)
    proxy = dataclasses.replace(task.proxy, iterations=500, score_iterations=700)
    return dataclasses.replace(task, proxy=proxy)


STAGE = Stage(
    name="ccs",
    title="CCS: coverage-centric coresets",
    problem="Keeping only the hardest examples works until much is pruned, then collapses. "
    "CCS drops the hopeless tail and covers the rest.",
    command="raysys coreset score --set data.name=fashion-mnist",
    run=run,
)
