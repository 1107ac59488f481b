"""One worker's training: build, resume, train with checkpoints, report."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from actors.kgt import start_remote_control
from jobs.train import data, network
from jobs.train.config import TrainConfig
from raysys.training.datasets import Split
from raysys.training.kgt import (
    Control,
    EventLog,
    GradientCriterion,
    KGTConfig,
    LinearSchedule,
    ModulePlan,
    NoFreezing,
    StaticFreezing,
)
from raysys.training.kgt.config import resolve
from raysys.training.kgt.controller import EventSink, ignore
from raysys.training.kgt.events import read_events
from raysys.training.kgt.inline import inline_control
from raysys.training.kgt.loop import TrainLoop

STATE_FILE = "training.pt"
CONTROLLER_STATE = "controller.pkl"
CONTROLLER_EVENTS = "controller.jsonl"


def make_control(
    config: TrainConfig,
    model: torch.nn.Module,
    plan: ModulePlan,
    steps: int,
    log: EventSink,
    folder: str = "",
) -> Control:
    """The controller that the method names.

    Args:
        folder: local folder where a controller actor keeps the state that it restarts from, and
            its events.
    """
    if config.method == "vanilla":
        return NoFreezing()
    if config.method == "linear":
        return LinearSchedule(config.freeze_start, config.freeze_level, len(plan), steps)
    if config.method == "static":
        upto = min(int(config.freeze_level * len(plan)), len(plan) - 1)
        return StaticFreezing(round(config.freeze_start * steps), upto)
    if config.method == "gradient":
        return GradientCriterion(config.gradient_interval, len(plan))
    options: KGTConfig = resolve(config.kgt, steps, len(plan))
    if config.control == "actors":
        state, events = (
            str(Path(folder) / name) if folder else ""
            for name in (CONTROLLER_STATE, CONTROLLER_EVENTS)
        )
        return start_remote_control(options, model, plan, steps, state_path=state, log_path=events)
    return inline_control(options, model, plan, steps, log)


def make_loop(
    config: TrainConfig, split: Split, *, log: EventSink = ignore, folder: str = "", **options: Any
) -> TrainLoop:
    """A seeded model and its training loop; ``folder`` as in :func:`make_control`."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    model = network.build(config.network, split)

    def control(plan: ModulePlan, steps: int) -> Control:
        return make_control(config, model, plan, steps, log, folder)

    options.setdefault("control", control)
    return TrainLoop(
        model, data.tensors(split.train), config.recipe, config.kgt, log=log, **options
    )


def all_events(log: EventLog, folder: str) -> list[dict[str, Any]]:
    """The loop's events and, where a controller actor writes its own, those, by step."""
    path = Path(folder) / CONTROLLER_EVENTS
    apart = read_events(path) if folder and path.exists() else []
    return sorted([*log.rows, *apart], key=lambda row: int(row.get("step", 0)))


def train(
    loop: TrainLoop,
    every: int,
    save: Callable[[int, dict[str, Any]], None],
    advance: Callable[[float], None],
) -> None:
    """Train to the end, saving every so many optimizer steps (0: once per epoch)."""
    period = every or loop.steps_per_epoch

    def on_step() -> None:
        advance(1)
        if loop.step % period == 0 or loop.done:
            save(loop.step, loop.state_dict())

    loop.run(on_step=on_step)


def to_bytes(state: Mapping[str, Any]) -> bytes:
    """A checkpoint as bytes."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getvalue()


def from_bytes(content: bytes) -> dict[str, Any]:
    """The state of a checkpoint that this job wrote."""
    state: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True)
    return state


def from_file(path: Path) -> dict[str, Any]:
    """The state of a checkpoint file."""
    return from_bytes(path.read_bytes())
