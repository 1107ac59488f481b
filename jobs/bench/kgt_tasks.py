"""The training tasks and methods of the KGT benchmark, run side by side in slices.

All methods of one seed are built first and then advance in turn, an epoch at a time, so that a
change of the machine's load meets all of them. CPU seconds are the process's.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from raysys import machine
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

STATIC_MODULES = 4
KGT_OPTIONS: Mapping[str, Any] = {
    "window": 8,
    "every": 12,
    "reference": "fp32",
    "scope": "all",
    "unfreeze": "settled",
    "keep_thresholds": True,
    "modules": 16,
}


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Task:
    """Examples, a network and a recipe."""

    name: str
    split: Split
    network: Callable[[], nn.Module]
    recipe: Recipe


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """One finished run."""

    method: str
    seed: int
    accuracy: float
    cpu_s: float
    evaluation_s: float
    schedule: list[tuple[int, int]]
    hit_rate: float

    def row(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)


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
    )


@functools.cache
def images(profile: Profile, schedule: str) -> Task:
    """Fashion-MNIST at 14 x 14 pixels where the data is on this machine, digits elsewhere."""
    rows, epochs = profile.pick((2000, 10), (8000, 20))
    try:
        split = datasets.fashion_mnist(machine.data_dir(), rows, 4000, pool=2)
    except CapabilityError:
        split = datasets.digits()
    network = functools.partial(ResNet, 10, widths=(8, 8, 16, 16, 32, 32))
    recipe = Recipe(epochs=epochs, batch_size=128, schedule=schedule)
    return Task(f"{split.name}-{schedule}", split, network, recipe)


def train_data(arrays: LabelledArrays) -> TrainData:
    """Arrays as tensors."""
    return TrainData(torch.from_numpy(arrays.x), torch.from_numpy(arrays.y), arrays.ids)


@functools.cache
def plan_signature(task: Task) -> list[list[str]]:
    """Block names, one module per block: the same grouping for every run of a task."""
    example = (torch.from_numpy(task.split.train.x[:64]),)
    return parse(task.network(), example, modules=16).signature()


def cached() -> CacheConfig:
    """A cache in a folder of its own."""
    return CacheConfig(directory=tempfile.mkdtemp(prefix="raysys-kgt-"))


Method = Callable[[int], tuple[KGTConfig | None, Callable[[ModulePlan, int], Control] | None]]


def vanilla(seed: int) -> tuple[KGTConfig, Callable[[ModulePlan, int], Control]]:
    """No freezing."""
    del seed
    return KGTConfig(), lambda plan, steps: NoFreezing()


def kgt(cache: bool, **changes: Any) -> Method:
    """Knowledge-guided freezing with the benchmark's options."""

    def make(seed: int) -> tuple[KGTConfig, None]:
        del seed
        store = cached() if cache else CacheConfig()
        return KGTConfig(**{**KGT_OPTIONS, **changes}, cache=store), None

    return make


def linear(start: float) -> Method:
    """Composer's linear schedule over all modules from ``start`` on, with the cache."""
    return _scheduled(lambda plan, steps: LinearSchedule(start, 1.0, len(plan), steps))


def static(start: float) -> Method:
    """A fixed front part frozen from ``start`` on, with the cache."""
    return _scheduled(lambda plan, steps: StaticFreezing(round(start * steps), STATIC_MODULES))


def gradient(interval: int) -> Method:
    """AutoFreeze's criterion, with the cache."""
    return _scheduled(lambda plan, steps: GradientCriterion(interval, len(plan)))


def _scheduled(control: Callable[[ModulePlan, int], Control]) -> Method:
    def make(seed: int) -> tuple[KGTConfig, Callable[[ModulePlan, int], Control]]:
        del seed
        return KGTConfig(cache=cached()), control

    return make


def side_by_side(task: Task, methods: Mapping[str, Method], seed: int) -> dict[str, Outcome]:
    """Train all methods from the same initial weights and data order, in turn, to the end."""
    torch.set_num_threads(1)
    loops: dict[str, tuple[TrainLoop, EventLog]] = {}
    for name, method in methods.items():
        torch.manual_seed(seed)
        config, control = method(seed)
        log = EventLog()
        recipe = dataclasses.replace(task.recipe, seed=seed)
        loop = TrainLoop(
            task.network(),
            train_data(task.split.train),
            recipe,
            config,
            control=control,
            signature=plan_signature(task),
            log=log,
        )
        loops[name] = (loop, log)
    while not all(loop.done for loop, _ in loops.values()):
        for loop, _ in loops.values():
            loop.run(until=loop.step + loop.steps_per_epoch)
    return {name: _outcome(task, name, seed, *pair) for name, pair in loops.items()}


def _outcome(task: Task, name: str, seed: int, loop: TrainLoop, log: EventLog) -> Outcome:
    test = train_data(task.split.test)
    accuracy = loop.accuracy(test.x, test.y)
    hit_rate = loop.kgt.status()["cache_hit_rate"]
    loop.close()
    return Outcome(
        name, seed, accuracy, loop.cpu_s, loop.kgt.evaluation_s, schedule_of(log.rows), hit_rate
    )


def mean_points(outcomes: Sequence[Outcome]) -> float:
    """Mean accuracy in points."""
    return 100 * statistics.fmean(outcome.accuracy for outcome in outcomes)


def cpu_ratio(ours: Sequence[Outcome], base: Sequence[Outcome]) -> float:
    """Median over seeds of our CPU time over the other's."""
    return statistics.median(mine.cpu_s / other.cpu_s for mine, other in zip(ours, base))


def start_for(task: Task, target: float, kind: str) -> float:
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
                upto = min(int(share * len(plan)), len(plan) - 1)
            else:
                upto = STATIC_MODULES if progress >= start else 0
            forward = sum(cost.forward_s for cost in costs[:upto])
            total += Savings(costs, True, 0.1 * forward).step_s(upto)
        return total / (epochs * Savings(costs).step_s(0))

    grid = [step / 50 for step in range(50)]
    return min(grid, key=lambda start: abs(predicted(start) - target))
