"""Tour: freezing what has converged, against plain training and a fixed schedule."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from jobs.tour.stage import Row, Stage, StageContext, StageResult
from jobs.train.figures import plasticity_figure
from raysys import scratch
from raysys.report import Plot
from raysys.training.datasets import digits, mnist1d
from raysys.training.kgt import CacheConfig, EventLog, KGTConfig, LinearSchedule
from raysys.training.kgt.events import frozen_share, timeline
from raysys.training.kgt.loop import ControlFactory, Recipe, TrainData, TrainLoop
from raysys.training.kgt.models import ResNet, resnet1d

_KGT = KGTConfig(
    window=4,
    every=6,
    reference="fp32",
    scope="all",
    unfreeze="settled",
    keep_thresholds=True,
    gram_rows=32,
)


def run(context: StageContext) -> StageResult:
    """Train three ways side by side, one epoch of each in turn."""
    with scratch.folder("kgt") as folder:
        return _side_by_side(context, folder)


def _side_by_side(context: StageContext, folder: Path) -> StageResult:
    torch.set_num_threads(1)
    split = digits() if context.smoke else mnist1d(1500, 1500)
    recipe = Recipe(epochs=4 if context.smoke else 20, batch_size=64, seed=context.seed)
    data = TrainData(
        torch.from_numpy(split.train.x), torch.from_numpy(split.train.y), split.train.ids
    )
    ways: dict[str, tuple[KGTConfig, ControlFactory | None]] = {
        "plain training": (KGTConfig(), None),
        "linear schedule": (
            _cached(context.smoke, folder / "linear"),
            lambda plan, steps: LinearSchedule(0.5, 1.0, len(plan), steps),
        ),
        "KGT": (_cached(context.smoke, folder / "kgt"), None),
    }
    logs = {name: EventLog() for name in ways}
    loops = {}
    for name, (config, control) in ways.items():
        torch.manual_seed(context.seed)
        network = ResNet(10, widths=(8, 8, 16)) if context.smoke else resnet1d()
        frozen = None if name == "plain training" else config
        loops[name] = TrainLoop(
            network,
            data,
            recipe,
            frozen,
            control=control,
            log=logs[name],
            signature=_signature(network),
        )
    total = sum(loop.total_steps for loop in loops.values())
    while not all(loop.done for loop in loops.values()):
        for name, loop in loops.items():
            loop.run(until=loop.step + loop.steps_per_epoch)
            context.progress(sum(each.step for each in loops.values()), total, name)
    x, y = torch.from_numpy(split.test.x), torch.from_numpy(split.test.y)
    accuracy = {name: loop.accuracy(x, y) for name, loop in loops.items()}
    kgt = loops["KGT"]
    rows = _rows({name: loop.cpu_s for name, loop in loops.items()}, accuracy)
    result = StageResult(rows=rows, plots=[_plot(logs["KGT"])], notes=_notes(kgt, logs["KGT"]))
    for loop in loops.values():
        loop.close()
    return result


def _cached(smoke: bool, folder: Path) -> KGTConfig:
    config = dataclasses.replace(_KGT, cache=CacheConfig(directory=str(folder)))
    # A few dozen steps allow only a few readings.
    return dataclasses.replace(config, window=2, every=2, bootstrap_rate=1.0) if smoke else config


def _signature(network: ResNet) -> list[list[str]]:
    """One module per residual block, so that all three train with the same grouping."""
    inner = [[f"blocks.{index}"] for index in range(len(network.blocks))]
    return [["stem.0", "stem.1"], *inner, ["head"]]


def _rows(cpu_s: dict[str, float], accuracy: dict[str, float]) -> list[Row]:
    return [
        row
        for name in ("plain training", "linear schedule")
        for row in (
            Row(measure="training time", unit="CPU s", better="lower", baseline_name=name,
                baseline=cpu_s[name], ours=cpu_s["KGT"]),
            Row(measure="accuracy", unit="share", better="higher", baseline_name=name,
                baseline=accuracy[name], ours=accuracy["KGT"]),
        )
    ]  # fmt: skip


def _plot(log: EventLog) -> Plot:
    return Plot(
        title="Plasticity of each layer module",
        caption="Where a curve has been flat for a window the module freezes (dashed lines).",
        figure=plasticity_figure(log.rows),
    )


def _notes(loop: TrainLoop, log: EventLog) -> list[str]:
    modules = len(loop.kgt.plan)
    share = frozen_share(log.rows, modules, loop.total_steps)
    hit = loop.kgt.status()["cache_hit_rate"]
    return [
        f"{sum(share) / modules:.0%} of all modules and steps were frozen; "
        f"{hit:.0%} of the frozen prefixes came from the activation cache",
        *timeline(log.rows, modules, loop.total_steps),
    ]


STAGE = Stage(
    name="kgt",
    title="Knowledge-guided layer freezing",
    problem="The front layers of a network converge long before training ends, yet every step "
    "computes their gradients. Freeze what has stopped changing, and read its output from disk.",
    command="raysys train --set data.source=mnist1d --set kgt.cache.directory=/tmp/activations",
    run=run,
)
