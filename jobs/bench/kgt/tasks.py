"""The training tasks and methods of the KGT benchmark, run side by side in slices.

All methods of one seed are built first and then advance in turn, an epoch at a time, so that a
change of the machine's load meets all of them. CPU seconds are the process's.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from raysys import machine, scratch
from raysys.bench import Profile
from raysys.errors import CapabilityError
from raysys.training import datasets
from raysys.training.datasets import LabelledArrays, Split
from raysys.training.kgt import (
    CacheConfig,
    EventLog,
    GradientCriterion,
    KGTConfig,
    LinearSchedule,
    ModulePlan,
    NoFreezing,
    StaticFreezing,
)
from raysys.training.kgt.baselines import schedule_of
from raysys.training.kgt.decision import Control
from raysys.training.kgt.loop import Recipe, TrainData, TrainLoop
from raysys.training.kgt.models import ResNet, resnet1d
from raysys.training.kgt.plan import parse
from raysys.training.kgt.savings import Savings

KGT_OPTIONS: Mapping[str, Any] = {
    "window": 8,
    "reference": "fp32",
    "scope": "all",
    "unfreeze": "settled",
    "keep_thresholds": True,
    "modules": 16,
}


CURVE_ROWS = 1000  # test examples behind a curve's inner points


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Task:
    """Examples, a network and a recipe.

    Args:
        every: KGT's n, about five windows of readings in each phase of the rate; chosen, as all of
            :data:`KGT_OPTIONS`, on seeds that are not measured.
        min_epochs: KGT's critical period; the quick profile's runs are too short for a whole one.
    """

    name: str
    split: Split
    network: Callable[[], nn.Module]
    recipe: Recipe
    every: int = 12
    min_epochs: int = 8

    @property
    def steps(self) -> int:
        """Optimizer steps of a run."""
        return self.recipe.epochs * (len(self.split.train) // self.recipe.batch_size)

    def options(self) -> dict[str, Any]:
        """KGT's options on this task."""
        return {**KGT_OPTIONS, "every": self.every, "min_epochs": self.min_epochs}


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """One finished run.

    Args:
        evaluation_s: CPU seconds of reference and plasticity, part of ``cpu_s``.
        schedule: (step, frozen modules) at each change.
        cache_bytes: most rows on disk at the end of an epoch.
        curve: (CPU seconds, test accuracy) along the run, before the end on the first test
            examples only; measuring it is not in ``cpu_s``.
    """

    method: str
    seed: int
    accuracy: float
    cpu_s: float
    evaluation_s: float
    schedule: list[tuple[int, int]]
    hit_rate: float
    cache_bytes: int
    steps: int
    curve: list[tuple[float, float]]

    def row(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, slots=True)
class Method:
    """How one run decides what is frozen.

    Args:
        kind: ``vanilla``, ``kgt``, ``linear``, ``static`` or ``gradient``.
        cache: whether the frozen part is read from the activation cache.
        options: changes of the task's options for ``kgt``; ``start`` (share of the run) for
            ``linear`` and ``static``, with ``upto`` modules for the latter; ``interval`` (steps)
            for ``gradient``.
    """

    kind: str
    cache: bool = True
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def key(self, task: Task) -> dict[str, Any]:
        """All that the method's result depends on, JSON-ready."""
        return {
            "kind": self.kind,
            "cache": self.cache and self.kind != "vanilla",
            "options": {**(task.options() if self.kind == "kgt" else {}), **self.options},
        }

    def build(self, task: Task) -> tuple[KGTConfig, Callable[[ModulePlan, int], Control] | None]:
        """Options and controller; None is the knowledge-guided one."""
        if self.kind == "vanilla":
            return KGTConfig(), lambda plan, steps: NoFreezing()
        store = cached() if self.cache else CacheConfig()
        if self.kind == "kgt":
            return KGTConfig(**{**task.options(), **self.options}, cache=store), None
        return KGTConfig(cache=store), self._schedule

    def _schedule(self, plan: ModulePlan, steps: int) -> Control:
        if self.kind == "linear":
            return LinearSchedule(self.options["start"], 1.0, len(plan), steps)
        if self.kind == "static":
            return StaticFreezing(round(self.options["start"] * steps), self.options["upto"])
        return GradientCriterion(self.options["interval"], len(plan))


VANILLA = Method("vanilla", False)


@functools.cache
def mnist1d(profile: Profile, schedule: str) -> Task:
    """The paper-scale CPU task: 4,000 training and 4,000 test signals, 60 epochs in full."""
    rows, epochs = profile.pick((2000, 16), (4000, 60))
    split = datasets.mnist1d(rows, 4000)
    batch = profile.pick(64, 128)
    return Task(
        f"mnist1d-{schedule}",
        split,
        resnet1d,
        Recipe(epochs=epochs, batch_size=batch, schedule=schedule),
        min_epochs=profile.pick(2, 8),
    )


@functools.cache
def images(profile: Profile, schedule: str) -> Task:
    """Fashion-MNIST at 14 x 14 pixels where the data is on this machine, digits elsewhere."""
    rows, epochs = profile.pick((2000, 10), (6000, 16))
    try:
        split = datasets.fashion_mnist(machine.data_dir(), rows, 4000, pool=2)
    except CapabilityError:
        split = datasets.digits()
    network = functools.partial(ResNet, 10, widths=(8, 8, 16, 16, 32, 32))
    recipe = Recipe(epochs=epochs, batch_size=128, schedule=schedule)
    critical = profile.pick(2, 8)
    return Task(f"{split.name}-{schedule}", split, network, recipe, every=6, min_epochs=critical)


def train_data(arrays: LabelledArrays) -> TrainData:
    """Arrays as tensors."""
    return TrainData(torch.from_numpy(arrays.x), torch.from_numpy(arrays.y), arrays.ids)


def plan_signature(task: Task) -> list[list[str]]:
    """One module per residual block, the stem with the first: fixed, not by measured time."""
    blocks: Any = task.network().blocks
    inner = [[f"blocks.{index}"] for index in range(1, len(blocks))]
    return [["stem.0", "stem.1", "blocks.0"], *inner, ["head"]]


def cached() -> CacheConfig:
    """A cache in a folder of its own, which goes when the process ends."""
    return CacheConfig(directory=str(scratch.kept("kgt")))


def side_by_side(
    task: Task, methods: Mapping[str, Method], seed: int, *, curve_points: int = 1
) -> dict[str, Outcome]:
    """Train all methods from the same initial weights and data order, in turn, to the end.

    Args:
        curve_points: how often along the run the test accuracy is measured, the end included.
    """
    torch.set_num_threads(1)
    loops = {name: _Running(task, method, seed) for name, method in methods.items()}
    epochs = task.recipe.epochs
    measured = {round(epochs * (at + 1) / curve_points) for at in range(curve_points)}
    for epoch in range(1, epochs + 1):
        for running in loops.values():
            rows = len(task.split.test) if epoch == epochs else CURVE_ROWS
            running.advance(rows if epoch in measured else 0)
    return {name: running.finish(name) for name, running in loops.items()}


class _Running:
    """One method's training loop on the way."""

    def __init__(self, task: Task, method: Method, seed: int) -> None:
        torch.manual_seed(seed)
        config, control = method.build(task)
        self.seed = seed
        self.log = EventLog()
        self.test = train_data(task.split.test)
        self.curve: list[tuple[float, float]] = []
        self.cache_bytes = 0
        self.loop = TrainLoop(
            task.network(),
            train_data(task.split.train),
            dataclasses.replace(task.recipe, seed=seed),
            config,
            control=control,
            signature=plan_signature(task),
            log=self.log,
        )

    def advance(self, measured_rows: int) -> None:
        """Train one epoch, then measure accuracy on the first so many test examples."""
        self.loop.run(until=self.loop.step + self.loop.steps_per_epoch)
        self.cache_bytes = max(self.cache_bytes, self.loop.kgt.status()["cache_bytes"])
        if measured_rows:
            x, y = self.test.x[:measured_rows], self.test.y[:measured_rows]
            accuracy = self.loop.accuracy(x, y)
            self.curve.append((self.loop.cpu_s, accuracy))

    def finish(self, name: str) -> Outcome:
        """Close the run and sum it up."""
        loop = self.loop
        hit_rate = loop.kgt.status()["cache_hit_rate"]
        loop.close()
        return Outcome(
            method=name,
            seed=self.seed,
            accuracy=self.curve[-1][1],
            cpu_s=loop.cpu_s,
            evaluation_s=loop.kgt.evaluation_s,
            schedule=schedule_of(self.log.rows),
            hit_rate=hit_rate,
            cache_bytes=self.cache_bytes,
            steps=loop.total_steps,
            curve=self.curve,
        )


def mean_points(outcomes: Sequence[Outcome]) -> float:
    """Mean accuracy in points."""
    return 100 * statistics.fmean(outcome.accuracy for outcome in outcomes)


def cpu_ratio(ours: Sequence[Outcome], base: Sequence[Outcome]) -> float:
    """Median over seeds of our CPU time over the other's."""
    return statistics.median(mine.cpu_s / other.cpu_s for mine, other in zip(ours, base))


def start_for(task: Task, target: float, kind: str, upto: int = 0) -> float:
    """The ``start`` at which a schedule is predicted to take ``target`` of vanilla's CPU time.

    The prediction uses the plan's measured costs, with reads at a tenth of the prefix forward; the
    schedule is clipped where even its cheapest or dearest setting cannot reach the target.
    """
    example = (torch.from_numpy(task.split.train.x[: task.recipe.batch_size]),)
    plan = parse(task.network(), example, modules=16, signature=plan_signature(task))
    costs = [module.cost for module in plan.modules]
    epochs = task.recipe.epochs

    def predicted(start: float) -> float:
        total = 0.0
        for epoch in range(epochs):
            progress = epoch / epochs
            if kind == "linear":
                share = max(0.0, (progress - start) / (1 - start))
                frozen = min(int(share * len(plan)), len(plan) - 1)
            else:
                frozen = upto if progress >= start else 0
            forward = sum(cost.forward_s for cost in costs[:frozen])
            total += Savings(costs, True, 0.1 * forward).step_s(frozen)
        return total / (epochs * Savings(costs).step_s(0))

    grid = [step / 50 for step in range(50)]
    return min(grid, key=lambda start: abs(predicted(start) - target))
