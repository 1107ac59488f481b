"""A complete training loop around :class:`KGT` for arrays in memory, resumable at any step.

One worker resumes bit-identically: model, optimizer, scheduler, random generator, position in the
data order and all freezing state are in one state dict. With several ranks each keeps a fixed shard
(:class:`ShardStableSampler`), so that its activation cache stays useful.
"""

from __future__ import annotations

import dataclasses
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR

from raysys.config import check, check_choice, check_range
from raysys.errors import ConfigError, DataError
from raysys.training.kgt.baselines import NoFreezing
from raysys.training.kgt.config import KGTConfig
from raysys.training.kgt.controller import EventSink, ignore
from raysys.training.kgt.decision import Control
from raysys.training.kgt.plan import ModulePlan
from raysys.training.kgt.sampling import ShardStableSampler
from raysys.training.kgt.session import KGT, DataDescription, Wrap

ControlFactory = Callable[[ModulePlan, int], Control]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How to train.

    Args:
        optimizer: ``sgd`` (Nesterov momentum) or ``adamw``.
        schedule: ``step`` divides the rate by ten at each of ``drops``, ``cosine`` goes to zero.
        drops: shares of the run, ascending.
        clip_norm: clip the gradient's norm; 0 does not.
        accumulate: batches per optimizer step.
    """

    epochs: int = 20
    batch_size: int = 128
    optimizer: str = "sgd"
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "step"
    drops: tuple[float, ...] = (0.5, 0.75)
    clip_norm: float = 0.0
    accumulate: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_range(self, "epochs", 1)
        check_range(self, "batch_size", 2)
        check_choice(self, "optimizer", ("sgd", "adamw"))
        check_range(self, "lr", 0, low_open=True)
        check_range(self, "momentum", 0, 1, high_open=True)
        check_range(self, "weight_decay", 0)
        check_choice(self, "schedule", ("step", "cosine", "constant"))
        ascending = list(self.drops) == sorted(self.drops)
        check(
            self, "drops", ascending and all(0 < d < 1 for d in self.drops), "ascending, in (0, 1)"
        )
        check_range(self, "clip_norm", 0)
        check_range(self, "accumulate", 1)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class TrainData:
    """Examples in memory: inputs (N, ...), int64 labels (N,) and int64 ids (N,)."""

    x: Tensor
    y: Tensor
    ids: NDArray[np.int64]

    def fingerprint(self) -> str:
        """Checksum of shapes, ids and all input bytes: another data set has another one."""
        value = zlib.crc32(np.ascontiguousarray(self.x.numpy()).data)
        value = zlib.crc32(np.ascontiguousarray(self.ids).data, value)
        return f"{tuple(self.x.shape)}-{value:08x}"


class TrainLoop:
    """Trains a classifier.

    Args:
        freezing: options of the method; None trains plainly.
        control: makes another controller from the plan and the total steps.
        world: ranks of a data-parallel run, of which this is ``rank``.
    """

    def __init__(
        self,
        model: nn.Module,
        data: TrainData,
        recipe: Recipe,
        freezing: KGTConfig | None = None,
        *,
        control: ControlFactory | None = None,
        plan: ModulePlan | None = None,
        signature: Sequence[Sequence[str]] | None = None,
        wrap: Wrap | None = None,
        log: EventSink = ignore,
        rank: int = 0,
        world: int = 1,
        clock: Callable[[], float] = time.process_time,
    ) -> None:
        if len(data.y) // world < recipe.batch_size:
            raise ConfigError(
                "batch_size", recipe.batch_size, f"at most {len(data.y) // world} rows of a rank"
            )
        self.model = model.train()
        self.data = data
        self.world = world
        self.recipe = recipe
        self.sampler = ShardStableSampler(len(data.y), rank=rank, world=world, seed=recipe.seed)
        batches = len(data.y) // world // recipe.batch_size
        self.steps_per_epoch = max(1, batches // recipe.accumulate)
        self.total_steps = self.steps_per_epoch * recipe.epochs
        self.optimizer = make_optimizer(model, recipe)
        self.scheduler = make_scheduler(self.optimizer, recipe, self.total_steps)
        example = (data.x[: recipe.batch_size],)
        shard = data.ids[self.sampler.shard(0)]
        plain = freezing is None and control is None
        factory = (lambda plan, steps: NoFreezing()) if plain else control
        plan = plan or _plan_of(model, example, freezing, signature)
        self.kgt = KGT(
            model,
            self.optimizer,
            freezing,
            example=example,
            total_steps=self.total_steps,
            data=DataDescription(ids=shard, fingerprint=data.fingerprint()),
            control=factory(plan, self.total_steps) if factory else None,
            plan=plan,
            wrap=wrap,
            log=log,
        )
        self.cpu_s = 0.0
        self.last_loss = float("nan")
        self._clock = clock

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.kgt.steps

    @property
    def done(self) -> bool:
        """Whether the run is complete."""
        return self.step >= self.total_steps

    def run(self, until: int | None = None, on_step: Callable[[], None] | None = None) -> None:
        """Train up to an optimizer step (default: the end)."""
        stop = self.total_steps if until is None else min(until, self.total_steps)
        while self.step < stop:
            start = self._clock()
            epoch, done = divmod(self.step, self.steps_per_epoch)
            batches = self._batches(epoch)
            skip = done * self.recipe.accumulate
            self.kgt.start_epoch(epoch, [self.data.ids[rows] for rows in batches[skip:]])
            for at in range(skip, len(batches), self.recipe.accumulate):
                self._optimize(batches[at : at + self.recipe.accumulate])
                if on_step is not None:
                    self.cpu_s += self._clock() - start
                    on_step()
                    start = self._clock()
                if self.step >= stop:
                    break
            self.cpu_s += self._clock() - start

    def _batches(self, epoch: int) -> list[NDArray[np.int64]]:
        batches = list(self.sampler.batches(epoch, self.recipe.batch_size))
        return batches[: self.steps_per_epoch * self.recipe.accumulate]

    def _optimize(self, batches: Sequence[NDArray[np.int64]]) -> None:
        total = 0.0
        for rows in batches:
            index = torch.from_numpy(rows)
            logits = self.kgt(self.data.x[index], ids=self.data.ids[rows])
            loss = functional.cross_entropy(logits, self.data.y[index]) / len(batches)
            torch.autograd.backward(loss)
            total += float(loss.detach())
        if self.recipe.clip_norm:
            trained = [p for p in self.model.parameters() if p.grad is not None]
            nn.utils.clip_grad_norm_(trained, self.recipe.clip_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.kgt.step(total)
        self.optimizer.zero_grad(set_to_none=True)
        self.last_loss = total

    def accuracy(self, x: Tensor, y: Tensor, batch_size: int = 512) -> float:
        """Share of right predictions in eval mode; the model is back in training mode after."""
        self.model.eval()
        right = 0
        with torch.no_grad():
            for start in range(0, len(y), batch_size):
                part = slice(start, start + batch_size)
                right += int((self.model(x[part]).argmax(1) == y[part]).sum())
        self.model.train()
        self.kgt.freezer.enforce()
        return right / len(y)

    def state_dict(self) -> dict[str, Any]:
        """Everything, for ``torch.save``."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": torch.random.get_rng_state(),
            "kgt": self.kgt.state_dict(),
            "cpu_s": self.cpu_s,
            "world": self.world,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken.

        Raises:
            DataError: it belongs to another grouping of layer modules or number of ranks.
        """
        if state["world"] != self.world:
            raise DataError(
                "checkpoint",
                f"of a run with {state['world']} ranks, not {self.world}",
                f"Resume with workers={state['world']}",
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.kgt.load_state_dict(state["kgt"])
        torch.random.set_rng_state(state["random"])
        self.cpu_s = state["cpu_s"]

    def close(self, *, keep_cache: bool = False) -> None:
        """Release controller and cache; may be called twice."""
        self.kgt.close(keep_cache=keep_cache)


def _plan_of(
    model: nn.Module,
    example: tuple[Tensor, ...],
    freezing: KGTConfig | None,
    signature: Sequence[Sequence[str]] | None,
) -> ModulePlan:
    from raysys.training.kgt.plan import parse

    config = freezing or KGTConfig()
    return parse(
        model, example, modules=config.modules, pattern=config.pattern, signature=signature
    )


def make_optimizer(model: nn.Module, recipe: Recipe) -> Optimizer:
    """The recipe's optimizer over all parameters."""
    if recipe.optimizer == "adamw":
        return AdamW(model.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
    return SGD(
        model.parameters(),
        recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.momentum > 0,
    )


def make_scheduler(optimizer: Optimizer, recipe: Recipe, total_steps: int) -> LRScheduler:
    """The recipe's schedule over optimizer steps."""
    if recipe.schedule == "cosine":
        return CosineAnnealingLR(optimizer, total_steps)
    drops = [round(share * total_steps) for share in recipe.drops]
    return MultiStepLR(optimizer, drops if recipe.schedule == "step" else [], gamma=0.1)
