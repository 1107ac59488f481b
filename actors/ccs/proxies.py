"""Proxies, beta search and coverage as Ray tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from raysys.errors import ConfigError
from raysys.training.ccs.auto_beta import AutoBetaConfig, BetaChoice, choose_beta, plan_beta_trials
from raysys.training.ccs.coverage import Coverage, nearest_distances, summarise
from raysys.training.ccs.proxy import ProxyConfig, accuracies, train_stack
from raysys.training.ccs.selection import SelectionConfig
from raysys.training.ccs.table import ScoreTable
from raysys.training.datasets import LabelledArrays


def coverage_tasks(
    kept: NDArray[np.float32], targets: NDArray[np.float32], *, shards: int = 4
) -> Coverage:
    """Coverage of the targets by the kept features, one task per target shard."""
    import ray

    kept_ref = ray.put(kept)
    task = ray.remote(num_cpus=1)(nearest_distances)
    parts = [part for part in np.array_split(targets, max(1, shards)) if len(part)]
    return summarise(np.concatenate(ray.get([task.remote(kept_ref, part) for part in parts])))


def train_and_judge(
    data: LabelledArrays,
    subsets: list[NDArray[np.int64]],
    seeds: list[int],
    judged: LabelledArrays,
    config: ProxyConfig,
) -> list[float]:
    """A task: train a stack of proxies and return each one's accuracy on ``judged``."""
    import torch

    torch.set_num_threads(1)
    net = train_stack(data, subsets, seeds, config)
    return [float(value) for value in accuracies(net, judged)]


def train_many(
    data: LabelledArrays,
    subsets: Sequence[NDArray[np.int64]],
    seeds: Sequence[int],
    judged: LabelledArrays,
    config: ProxyConfig,
    *,
    stack: int = 4,
) -> list[float]:
    """Train one proxy per (rows, seed), ``stack`` to a task, and judge them; order is kept."""
    import ray

    data_ref, judged_ref = ray.put(data), ray.put(judged)
    task = ray.remote(num_cpus=1)(train_and_judge)
    answers = [
        task.remote(
            data_ref, list(subsets[low : low + stack]), list(seeds[low : low + stack]),
            judged_ref, config,
        )
        for low in range(0, len(subsets), stack)
    ]  # fmt: skip
    return [value for part in ray.get(answers) for value in part]


def auto_beta(
    data: LabelledArrays,
    table: ScoreTable,
    m: int,
    proxy: ProxyConfig,
    config: AutoBetaConfig | None = None,
    selection: SelectionConfig | None = None,
    *,
    score: str = "aum",
    stack: int = 4,
) -> BetaChoice:
    """Choose beta by proxies on held-out training data, as parallel tasks.

    Raises:
        ConfigError: the table and the data set are not about the same ids.
        InfeasibleError: no candidate leaves ``m`` examples.
    """
    plan = plan_beta_trials(table, m, config or AutoBetaConfig(), selection, score=score)
    position = row_finder(data.ids)
    judged = data.take(position(plan.holdout_ids))
    subsets = [position(trial.ids) for trial in plan.trials]
    seeds = [trial.seed for trial in plan.trials]
    return choose_beta(plan, train_many(data, subsets, seeds, judged, proxy, stack=stack))


def row_finder(ids: NDArray[np.int64]) -> Callable[[NDArray[np.int64]], NDArray[np.int64]]:
    """A function from example ids to their row positions.

    Raises:
        ConfigError: (when called) an id that is not there.
    """
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]

    def find(wanted: NDArray[np.int64]) -> NDArray[np.int64]:
        place = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
        if (ordered[place] != wanted).any():
            unknown = wanted[ordered[place] != wanted][:5].tolist()
            raise ConfigError("ids", unknown, "ids of the data set")
        rows: NDArray[np.int64] = order[place]
        return rows

    return find
