"""Local training of a plan on the device's own samples, step by step, under Swan.

The batches, and so the update, are those that the federated core draws for the same client, seed
and round: what is learned does not depend on where a client trains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from actors.swan.engine import Swan
from actors.swan.memory import out_of_memory
from actors.swan.task import TrainingTask
from raysys.errors import ConfigError, InterruptedRunError
from raysys.federated.core.batching import Batches, draw_batches
from raysys.federated.core.ladder import sample_losses
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.model import flatten, load_flat
from raysys.federated.core.population import Population
from raysys.federated.core.randomness import KeyedStreams, Purpose
from raysys.federated.core.training import Samples
from raysys.federated.swan.plans import Plan


@dataclass(frozen=True, slots=True)
class LocalResult:
    """Change of the weights, float32 [P], and what is told about the training."""

    delta: npt.NDArray[np.float32]
    facts: dict[str, float]


@dataclass(slots=True)
class Progress:
    """Steps done and losses seen; part of every checkpoint."""

    step: int = 0
    loss_first: float = math.nan
    loss_last: float = math.nan

    def state_dict(self) -> dict[str, float]:
        """Plain values."""
        return {
            "step": self.step,
            "loss_first": self.loss_first,
            "loss_last": self.loss_last,
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on there."""
        self.step = int(state["step"])
        self.loss_first, self.loss_last = state["loss_first"], state["loss_last"]


class LocalSgd(torch.optim.Optimizer):
    """The core's local SGD (momentum, weight decay, proximal term) as a torch optimiser."""

    def __init__(self, parameters: list[nn.Parameter], config: LocalConfig) -> None:
        super().__init__(parameters, {"lr": config.lr})
        self._config = config
        self._start = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step on the gradients that are there."""
        config = self._config
        for weight, start in zip(self.param_groups[0]["params"], self._start):
            grad = weight.grad
            if config.weight_decay:
                grad = grad.add(weight, alpha=config.weight_decay)
            if config.prox_mu:
                grad = grad.add(weight - start, alpha=config.prox_mu)
            if config.momentum:
                state = self.state[weight]
                speed = state.setdefault("speed", torch.zeros_like(weight))
                grad = speed.mul_(config.momentum).add_(grad)
            weight.add_(grad, alpha=-config.lr)


def train_plan(
    plan: Plan,
    weights: npt.NDArray[np.float32],
    samples: Samples,
    *,
    engine: Swan | None = None,
    folder: Path | None = None,
    stopped: Any = None,
    progress: Progress | None = None,
) -> LocalResult:
    """Train; with an engine the steps run under Swan, with a folder they survive a kill.

    Args:
        samples: the device's own, all of them.
        stopped: a ``threading.Event``; when set, training stops at the next step.
        progress: filled as it goes, for whoever watches from another thread.

    Raises:
        ConfigError: the loss is not finite, or the samples do not fit the model.
        InterruptedRunError: ``stopped`` was set; a checkpoint has been written.
    """
    module = load_flat(_build(plan), weights).train()
    parameters = list(module.parameters())
    optimizer = LocalSgd(parameters, plan.local)
    progress = progress or Progress()
    batches = own_batches(plan, len(samples.targets))
    if engine is None:
        _loop(plan, module, optimizer, samples, batches, progress, None, stopped)
    else:
        with engine.training(
            optimizer=optimizer, folder=folder, model=module, progress=progress
        ) as task:
            if stopped is not None:
                task.stopped = stopped.is_set
            _loop(plan, module, optimizer, samples, batches, progress, task, stopped)
    delta = flatten(module) - weights
    return LocalResult(_clipped(delta, plan.clip_norm), _facts(progress, samples, engine))


def own_batches(plan: Plan, n_samples: int) -> Batches:
    """The batches that the core draws for this client in this round."""
    offsets = np.zeros(plan.client + 2, dtype=np.int64)
    offsets[-1] = n_samples
    population = Population(offsets=offsets, sample_ids=np.arange(n_samples, dtype=np.int32))
    streams = KeyedStreams(plan.seed, Purpose.BATCHES, plan.round_id)
    clients = np.array([plan.client], dtype=np.int64)
    return draw_batches(population, clients, plan.local, streams)


def _build(plan: Plan) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        module: nn.Module = plan.spec.architecture.build()
    return module


def _loop(
    plan: Plan,
    module: nn.Module,
    optimizer: LocalSgd,
    samples: Samples,
    batches: Batches,
    progress: Progress,
    task: TrainingTask | None,
    stopped: Any,
) -> None:
    steps = len(batches.active)
    while progress.step < steps:
        if stopped is not None and stopped.is_set():
            raise InterruptedRunError("local training was told to stop")
        scale = batches.scale[progress.step, 0]
        filled = int(torch.count_nonzero(scale))
        index = batches.index[progress.step, 0, :filled]
        backward = partial(_backward, plan, module, optimizer, samples, index, scale[:filled], task)
        value = backward() if task is None else task.attempt(backward)
        if not math.isfinite(value):
            raise ConfigError("loss", value, "a finite loss", "The plan's learning rate diverges")
        if progress.step == 0:
            progress.loss_first = value
        progress.loss_last = value
        # Counted before the optimiser's hook, which may save: a checkpoint holds whole steps.
        progress.step += 1
        optimizer.step()


def _backward(
    plan: Plan,
    module: nn.Module,
    optimizer: LocalSgd,
    samples: Samples,
    index: Tensor,
    scale: Tensor,
    task: TrainingTask | None,
) -> float:
    """Gradients of one step, from micro-batches where the task wants them; returns its loss."""
    optimizer.zero_grad(set_to_none=True)
    value = 0.0
    whole = [slice(0, len(index))]
    for part in whole if task is None else task.micro_batches(len(index)):
        loss = _loss(plan, module, samples, index[part], scale[part])
        loss.backward()  # type: ignore[no-untyped-call]
        value += float(loss.detach())
    return value


def _loss(plan: Plan, module: nn.Module, samples: Samples, index: Tensor, scale: Tensor) -> Tensor:
    try:
        out = module(samples.inputs[index])
        return (sample_losses(out, samples.targets[index], plan.spec.task) * scale).sum()
    except (RuntimeError, IndexError) as error:
        if out_of_memory(error):
            raise
        text = str(error).splitlines()[0][:200]
        raise ConfigError("plan.model", text, "a model that fits this device's samples") from error


def _clipped(delta: npt.NDArray[np.float32], most: float) -> npt.NDArray[np.float32]:
    norm = float(np.linalg.norm(delta))
    if most > 0 and norm > most:
        scaled: npt.NDArray[np.float32] = (delta * (most / norm)).astype(np.float32)
        return scaled
    return delta


def _facts(progress: Progress, samples: Samples, engine: Swan | None) -> dict[str, float]:
    seconds, joules = (math.nan, math.nan) if engine is None else engine.typical_step()
    return {
        "n_samples": float(len(samples.targets)),
        "loss_first": progress.loss_first,
        "loss_last": progress.loss_last,
        "steps": float(progress.step),
        "seconds_per_step": seconds,
        "joules": joules,
    }
