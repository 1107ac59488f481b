"""Layer freezing for a training loop of your own.

    kgt = KGT(model, optimizer, config, example=(x,), total_steps=steps)
    for ids, x, y in loader:
        loss = criterion(kgt(x, ids=ids), y)
        loss.backward()
        optimizer.step()
        kgt.step(loss)                 # after the optimizer's step, before zero_grad
        optimizer.zero_grad()

Nothing here may fail a training run: whatever goes wrong with freezing turns freezing off, and
``notes`` says so. The frozen prefix changes on an optimizer-step boundary only.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from raysys.errors import ConfigError, DataError, StorageError
from raysys.training.kgt.cache import ActivationCache
from raysys.training.kgt.config import KGTConfig, resolve
from raysys.training.kgt.controller import EventSink, ignore
from raysys.training.kgt.decision import Control, Offer
from raysys.training.kgt.freezer import Freezer, check_model, check_optimizer
from raysys.training.kgt.hooks import Capture
from raysys.training.kgt.inline import inline_control
from raysys.training.kgt.plan import ModulePlan, parse
from raysys.training.kgt.plasticity import gram, subsample
from raysys.training.kgt.runner import SegmentRunner
from raysys.training.kgt.savings import Savings

Wrap = Callable[[nn.Module], nn.Module]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataDescription:
    """What the activation cache must know of the data.

    Args:
        ids: ids of all examples that this worker sees.
        fingerprint: changes when the data set does.
        augmentation: the view policy.
    """

    ids: NDArray[np.int64]
    fingerprint: str
    augmentation: str = "none"


class KGT:
    """Freezes the converged prefix of a model while it trains.

    Args:
        model: the model in training; its parameters stay the optimizer's.
        optimizer: its parameter groups are never edited.
        config: options; the automatic ones are filled in here.
        example: one batch of model inputs, for finding and measuring the layer modules.
        total_steps: planned optimizer steps.
        data: needed for the activation cache.
        control: another controller than the knowledge-guided one.
        plan: layer modules found before (see :func:`raysys.training.kgt.plan.parse`).
        signature: grouping to reproduce, from a checkpoint.
        wrap: applied to the forward module, and again after each change of the prefix: data
            parallelism, whose buckets are fixed when it is built.
        log: takes one mapping per event.
        clock: CPU seconds; ``evaluation_s`` adds up what reference and plasticity cost.

    Raises:
        ConfigError: bad options, an optimizer that moves parameters without gradients, or a model
            that is sharded or wrapped for data parallelism already.
        InfeasibleError: the model has fewer than two layer modules.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        config: KGTConfig | None = None,
        *,
        example: Sequence[Tensor] | Mapping[str, Tensor],
        total_steps: int,
        data: DataDescription | None = None,
        control: Control | None = None,
        plan: ModulePlan | None = None,
        signature: Sequence[Sequence[str]] | None = None,
        wrap: Wrap | None = None,
        log: EventSink = ignore,
        clock: Callable[[], float] = time.process_time,
    ) -> None:
        check_optimizer(optimizer)
        check_model(model)
        asked = config or KGTConfig()
        self.model = model
        self.optimizer = optimizer
        self.plan = plan or parse(
            model, example, modules=asked.modules, pattern=asked.pattern, signature=signature
        )
        self.config = resolve(asked, total_steps, len(self.plan))
        self.total_steps = total_steps
        self.notes = list(self.plan.notes)
        self.log = log
        self.freezer = Freezer(model, self.plan)
        self.control: Control = control or inline_control(
            self.config, model, self.plan, total_steps, log
        )
        self.runner = SegmentRunner(model, self.plan)
        self._wrap = wrap
        self._forward_module: nn.Module = wrap(self.runner) if wrap else self.runner
        self.cache = self._open_cache(data)
        self.steps = 0
        self.epoch = 0
        self._version = 0
        self._captured: Offer | None = None
        self._snapshot: list[Tensor] | None = None
        self._disabled = False
        self.evaluation_s = 0.0
        self._clock = clock

    def _open_cache(self, data: DataDescription | None) -> ActivationCache | None:
        if not self.config.cache.directory:
            return None
        if data is None:
            raise ConfigError("data", None, "a DataDescription", "The cache needs example ids")
        if self.plan.mode != "segments":
            self._note("no activation cache: the model could not be traced")
            return None
        try:
            return ActivationCache(
                self.config.cache, data.ids, data.fingerprint, augmentation=data.augmentation
            )
        except StorageError as error:
            self._note(f"no activation cache: {error}")
            return None

    @property
    def frozen_upto(self) -> int:
        """How many leading layer modules are frozen now."""
        return self.freezer.upto

    def __call__(self, *inputs: Tensor, ids: NDArray[np.int64] | None = None) -> Any:
        """Forward pass; in eval mode, or without gradients, simply the model's own.

        Args:
            ids: example ids of the rows, for the cache; without them the prefix is computed.
        """
        if not (self.model.training and torch.is_grad_enabled()):
            return self.model(*inputs)
        self.freezer.enforce()
        wanted = self.wanted()
        if self.plan.mode == "hooks":
            return self._hooked(inputs, wanted)
        upto = self.freezer.upto
        h = self._enter(inputs, ids) if upto else None
        rows = subsample(inputs[0].shape[0], self.config.gram_rows).stop
        out, kept = self._forward_module(inputs, h, upto, wanted, rows)
        if wanted:
            arriving = tuple(value.detach()[:rows] for value in (inputs if h is None else (h,)))
            outputs = dict(zip(wanted, kept))
            if self.config.eval_mode:
                outputs = self._eval_outputs(arriving, upto, wanted)
            self._keep(arriving, upto, outputs)
        return out

    def wanted(self) -> tuple[int, ...]:
        """Modules whose outputs the controller wants from the coming forward pass."""
        if self._disabled or self._captured is not None:
            return ()
        return tuple(index for index in self.control.wants(self.steps) if index >= self.frozen_upto)

    def _enter(self, inputs: Sequence[Tensor], ids: NDArray[np.int64] | None) -> Tensor:
        def compute(values: Sequence[Tensor], upto: int, h: Tensor | None, start: int) -> Tensor:
            return self.runner.prefix(values, upto, h, start)

        if self.cache is None or ids is None:
            return compute(inputs, self.freezer.upto, None, 0)
        return self.cache.gather(np.asarray(ids, np.int64), inputs, compute)

    def _hooked(self, inputs: Sequence[Tensor], wanted: Sequence[int]) -> Any:
        if not wanted:
            return self.model(*inputs)
        rows = subsample(inputs[0].shape[0], self.config.gram_rows).stop
        units = {index: self.plan.modules[index].units[-1] for index in wanted}
        with Capture(self.model, units, rows) as capture:
            out = self.model(*inputs)
        self._keep(tuple(value.detach()[:rows] for value in inputs), 0, capture.outputs)
        return out

    def _eval_outputs(
        self, arriving: Sequence[Tensor], start: int, wanted: Sequence[int]
    ) -> dict[int, Tensor]:
        """Outputs of the model in training in eval mode, by an extra pass over the sub-sample."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        value = arriving[0] if start else None
        found: dict[int, Tensor] = {}
        for index in range(start, max(wanted) + 1):
            value = self.runner.prefix(arriving, index + 1, value, index)
            if index in wanted:
                found[index] = value
        for module, mode in modes:
            module.training = mode
        return found

    def _keep(
        self, arriving: tuple[Tensor, ...], start: int, outputs: Mapping[int, Tensor]
    ) -> None:
        begin = self._clock()
        grams = {index: gram(value) for index, value in outputs.items()}
        self._captured = Offer(self.steps, self.rate(), arriving, start, grams)
        self.evaluation_s += self._clock() - begin

    def offer(self, offer: Offer) -> None:
        """Take a batch that was captured outside; it is evaluated at the next :meth:`step`."""
        self._captured = offer

    def rate(self) -> float:
        """The largest learning rate among the parameter groups."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def step(self, loss: Tensor | float, *, skipped: bool = False) -> None:
        """One optimizer step is done; call between ``optimizer.step()`` and ``zero_grad()``.

        Args:
            loss: the step's training loss.
            skipped: the gradient scaler left this step out; it does not count as a reading.
        """
        offer, self._captured = self._captured, None
        if self._disabled:
            self.steps += 1
            return
        value = float(loss.detach()) if isinstance(loss, Tensor) else float(loss)
        self._check_frozen()
        if getattr(self.control, "needs_gradients", False):
            parameters = [list(module.parameters) for module in self.plan.modules]
            self.control.gradients(self.steps, parameters)
        if offer is not None and not skipped and math.isfinite(value):
            begin = self._clock()
            self.control.offer(offer)
            self.evaluation_s += self._clock() - begin
        self.control.observe(self.steps, value, self.rate(), self.epoch)
        self.steps += 1
        decision = self.control.latest()
        if decision.version > self._version and decision.effective_step <= self.steps:
            self._version = decision.version
            self.apply(decision.frozen_upto, decision.reason)

    def apply(self, upto: int, reason: str = "asked for") -> None:
        """Freeze exactly the first ``upto`` modules from now on.

        Raises:
            ConfigError: ``upto`` would freeze the head or is negative.
        """
        before = self.freezer.upto
        if upto == before:
            return
        self.freezer.apply(upto)
        if self.cache is not None:
            self.cache.move(upto)
        if self._wrap is not None:
            self._forward_module = self._wrap(self.runner)
        # After wrapping: data parallelism brings all ranks' buffers to rank 0's when it is built.
        self._snapshot = self.freezer.snapshot() if upto else None
        self.log({"event": "applied", "step": self.steps, "upto": upto, "reason": reason})

    def _check_frozen(self) -> None:
        """After the first step of a new prefix: did the optimizer really leave it alone?"""
        if self._snapshot is None:
            return
        snapshot, self._snapshot = self._snapshot, None
        if self.freezer.unchanged(snapshot):
            return
        self.freezer.restore(snapshot)
        reason = "the optimizer or the loop changed frozen parameters or buffers"
        if self._wrap is None:
            self.disable(reason)
        else:
            self._note(reason)  # one rank must not change the prefix alone

    def disable(self, reason: str) -> None:
        """Freeze and evaluate nothing any more; train everything (nothing stays frozen)."""
        self._note(reason)
        self.log({"event": "disabled", "step": self.steps, "reason": reason})
        self.apply(0, reason)
        self._disabled = True

    def _note(self, reason: str) -> None:
        self.notes.append(reason)

    def start_epoch(self, epoch: int, batches: Sequence[NDArray[np.int64]] = ()) -> None:
        """Tell the epoch, and the ids of its batches in order if they should be read ahead."""
        self.epoch = epoch
        if self.cache is not None and len(batches):
            self.cache.read_ahead(batches)

    def status(self) -> dict[str, Any]:
        """Figures for a progress line."""
        savings = Savings(
            [module.cost for module in self.plan.modules],
            self.cache is not None and self.cache.active,
        )
        return {
            "frozen": self.frozen_upto,
            "modules": len(self.plan),
            "cache_hit_rate": self.cache.stats.hit_rate if self.cache else 0.0,
            "cache_bytes": self.cache.used_bytes if self.cache else 0,
            "predicted_speedup": savings.speedup(self.frozen_upto),
        }

    def state_dict(self) -> dict[str, Any]:
        """Freezing state for a checkpoint; save it with model, optimizer and scheduler."""
        return {
            "signature": self.plan.signature(),
            "steps": self.steps,
            "epoch": self.epoch,
            "version": self._version,
            "frozen_upto": self.frozen_upto,
            "disabled": self._disabled,
            "notes": list(self.notes),
            "control": self.control.state_dict(),
            "cache": self.cache.state_dict() if self.cache is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint. Load model, optimizer and scheduler first, for all parameters.

        Raises:
            DataError: the checkpoint holds another grouping; the message says where it differs.
        """
        check_signature(self.plan.signature(), state["signature"])
        self.steps, self.epoch = state["steps"], state["epoch"]
        self._version, self._disabled = state["version"], state["disabled"]
        self.notes = list(state["notes"])
        self.control.load_state_dict(state["control"])
        self.freezer.apply(state["frozen_upto"])
        if self.cache is not None and state["cache"] is None:
            self.cache.move(state["frozen_upto"])
        elif self.cache is not None:
            try:
                self.cache.load_state_dict(state["cache"])
            except StorageError as error:
                self.cache.turn_off(str(error))
        if self._wrap is not None:
            self._forward_module = self._wrap(self.runner)

    def close(self, *, keep_cache: bool = False) -> None:
        """Release the controller and the cache; may be called twice."""
        self.control.close()
        if self.cache is not None:
            self.cache.close(keep=keep_cache)


def check_signature(here: Sequence[Sequence[str]], there: Sequence[Sequence[str]]) -> None:
    """Compare groupings.

    Raises:
        DataError: they differ; the message shows the first difference.
    """
    if [list(units) for units in here] == [list(units) for units in there]:
        return
    pairs = list(zip(here, there))
    at = next((i for i, (mine, other) in enumerate(pairs) if list(mine) != list(other)), len(pairs))
    mine = list(here[at]) if at < len(here) else "nothing"
    other = list(there[at]) if at < len(there) else "nothing"
    raise DataError(
        "checkpoint",
        f"groups layer modules differently: module {at} is {other} there and {mine} here",
        "Pass the checkpoint's signature, or the same `modules` and `pattern`",
    )
