"""Runs that several claims share: one scoring run per data set, proxies on coresets, each once.

Everything runs as Ray tasks, several stacked proxies to a task. The test set is only ever used to
judge; beta is chosen by cross-validation on the training set.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.ccs import auto_beta, row_finder, train_many
from actors.session import Session, SessionConfig
from jobs.bench.ccs.tasks import Task, fashion_task, signal_task
from raysys import machine
from raysys.training.ccs.auto_beta import AutoBetaConfig, BetaChoice
from raysys.training.ccs.baselines import Method
from raysys.training.ccs.proxy import ProxyConfig, features_of, score_run
from raysys.training.ccs.table import ScoreTable
from raysys.training.datasets import LabelledArrays, flip_labels

Key = tuple[Method, int, int, int]  # method, examples kept, seed, iterations
FRESH_SEED = 1000  # seeds of the measured runs; none was used while the defaults were chosen


@functools.cache
def session() -> Session:
    """One private Ray for the whole benchmark, closed at exit."""
    started = Session.start(
        SessionConfig(address="local", num_cpus=machine.available_cores(), object_store_mb=512)
    )
    atexit.register(started.close)
    return started


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """What one scoring run gives, beside its table."""

    table: ScoreTable
    test_features: NDArray[np.float32]
    full_accuracy: float


def score_task(
    train: LabelledArrays, test: LabelledArrays, proxy: ProxyConfig, seed: int
) -> Scored:
    """A task: the scoring run."""
    import torch

    from raysys.training.ccs.proxy import accuracies

    torch.set_num_threads(1)
    net, table = score_run(train, proxy, seed)
    return Scored(table, features_of(net, test), float(accuracies(net, test)[0]))


class Lab:
    """One data set with its scores; trains each (method, budget, seed) once.

    Args:
        noise: share of the training labels to flip; the test labels stay clean.
        partial: folder where results are kept, so that an interrupted claim goes on.
    """

    def __init__(self, task: Task, noise: float = 0.0, partial: str = "") -> None:
        import ray

        session()
        self._kept = KeptResults(partial, f"{task.name}-{noise:g}-{task.proxy}")
        self.task = task
        self.test = task.split.test
        self.train = task.split.train
        self.flipped = np.zeros(len(self.train), np.bool_)
        if noise > 0:
            labels, self.flipped = flip_labels(self.train.y, noise, self.train.classes, seed=7)
            self.train = self.train.with_labels(labels)
        job = ray.remote(num_cpus=1)(score_task)
        self._scoring = job.remote(self.train, self.test, task.proxy, 0)
        self._done: dict[Key, float] = {}
        self._rows = row_finder(self.train.ids)

    @functools.cached_property
    def scored(self) -> Scored:
        """The scoring run's result; waits for it."""
        import ray

        result: Scored = ray.get(self._scoring)
        return result

    def budget(self, pruned: float) -> int:
        """Coreset size at a pruning rate."""
        return round((1 - pruned) * len(self.train))

    def accuracy(
        self,
        methods: Sequence[Method],
        pruned: float,
        seeds: Sequence[int],
        iterations: int | None = None,
    ) -> list[list[float]]:
        """Test accuracy in percent of the last model, for each method and seed."""
        proxy = self.task.proxy
        if iterations is not None:
            proxy = dataclasses.replace(proxy, iterations=iterations)
        m = self.budget(pruned)
        keys = [(method, m, seed, proxy.iterations) for method in methods for seed in seeds]
        for key in dict.fromkeys(keys):
            if key not in self._done and (kept := self._kept.get(key)) is not None:
                self._done[key] = kept
        missing = [key for key in dict.fromkeys(keys) if key not in self._done]
        batch = self.task.stack * machine.available_cores()
        for low in range(0, len(missing), batch):
            self._train(missing[low : low + batch], proxy)
        values = [100 * self._done[key] for key in keys]
        return [values[low : low + len(seeds)] for low in range(0, len(values), len(seeds))]

    def _train(self, keys: Sequence[Key], proxy: ProxyConfig) -> None:
        table, stack = self.scored.table, self.task.stack
        subsets = [self._rows(method.select(table, m, seed)) for method, m, seed, _ in keys]
        seeds = [key[2] for key in keys]
        found = dict(
            zip(keys, train_many(self.train, subsets, seeds, self.test, proxy, stack=stack))
        )
        self._done.update(found)
        self._kept.add(found)

    @functools.cache  # noqa: B019 - a lab lives as long as the benchmark's process
    def auto_beta(self, pruned: float, repeats: int = 2) -> BetaChoice:
        """Beta by cross-validation on the training set."""
        config = AutoBetaConfig(repeats=repeats, seed=17)
        kept = self._kept.get(("auto_beta", pruned, config))
        if kept is not None:
            betas = {float(beta): value for beta, value in kept["accuracy"].items()}
            return BetaChoice(kept["beta"], betas, tuple(kept["plateau"]), kept["tolerance"])
        m, stack = self.budget(pruned), self.task.stack
        choice = auto_beta(self.train, self.scored.table, m, self.task.proxy, config, stack=stack)
        self._kept.add({("auto_beta", pruned, config): dataclasses.asdict(choice)})
        return choice


class KeptResults:
    """Results in a JSON-lines file, one line each, keyed by the text of all they depend on.

    Args:
        folder: created where it is missing; empty keeps nothing.
        prefix: what the keys of this lab have in common.
    """

    def __init__(self, folder: str, prefix: str) -> None:
        self._path = Path(folder) / "proxies.jsonl" if folder else None
        self._prefix = prefix
        self._rows: dict[str, Any] = {}
        if self._path is not None and self._path.exists():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self._rows[row["key"]] = row["result"]

    def get(self, key: tuple[Any, ...]) -> Any:
        """The kept result, or None."""
        return self._rows.get(f"{self._prefix}-{key}")

    def add(self, results: Mapping[tuple[Any, ...], Any]) -> None:
        """Append results to the file."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            for key, result in results.items():
                file.write(json.dumps({"key": f"{self._prefix}-{key}", "result": result}) + "\n")


@functools.cache
def lab_of(name: str, noise: float = 0.0, partial: str = "") -> Lab:
    """The lab of task ``"A"`` or ``"B"``; scoring starts at once and is waited for when needed."""
    return Lab(signal_task() if name == "A" else fashion_task(), noise, partial)
