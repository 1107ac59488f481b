"""Layer freezing for a loop that calls the model itself: Lightning, HF Trainer, legacy code.

Forward hooks on the model take the place of ``kgt(x)``: they keep frozen blocks in eval mode,
capture what the controller wants, and note the loss. The prefix cannot be skipped from inside the
model's own forward, so there is no activation cache here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from raysys.errors import CapabilityError
from raysys.training.kgt.config import CacheConfig, KGTConfig
from raysys.training.kgt.controller import EventSink, ignore
from raysys.training.kgt.decision import Offer
from raysys.training.kgt.freezer import check_model
from raysys.training.kgt.hooks import Capture
from raysys.training.kgt.plan import parse
from raysys.training.kgt.plasticity import gram
from raysys.training.kgt.session import KGT

Inputs = tuple[Tensor, ...] | dict[str, Tensor]


class WatchedKGT:
    """Watches a model that others call; built on its first training batch.

    Args:
        state: a :meth:`state_dict` to go on from.

    Raises:
        ConfigError: the model is sharded or wrapped.
        CapabilityError: several ranks train; the framework's data parallelism has fixed buckets.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        config: KGTConfig,
        total_steps: int,
        *,
        state: Mapping[str, Any] | None = None,
        log: EventSink = ignore,
    ) -> None:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise CapabilityError(
                "layer freezing by a callback", f"{dist.get_world_size()} ranks train",
                "Use raysys train with workers, or KGT(..., wrap=...) in a loop of your own",
            )  # fmt: skip
        check_model(model)
        self.model = model
        self.optimizer = optimizer
        self.config = dataclasses.replace(config, cache=CacheConfig())
        self.total_steps = total_steps
        self.log = log
        self.kgt: KGT | None = None
        self.last_loss = float("nan")
        self._example: Inputs | None = None
        self._arriving: Inputs | None = None
        self._capture: Capture | None = None
        self._offer: Offer | None = None
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
        ]
        if state is not None:
            self._example = state["example"]
            self._build(state["kgt"])

    def _build(self, state: Mapping[str, Any] | None = None) -> None:
        assert self._example is not None
        self._pause(True)
        try:
            plan = parse(
                self.model,
                self._example,
                modules=self.config.modules,
                pattern=self.config.pattern,
                signature=state["signature"] if state is not None else None,
                hooks_only=True,
            )
        finally:
            self._pause(False)
        self.kgt = KGT(
            self.model,
            self.optimizer,
            self.config,
            example=(),
            total_steps=self.total_steps,
            plan=plan,
            log=self.log,
        )
        if state is not None:
            self.kgt.load_state_dict(state)

    def _pause(self, paused: bool) -> None:
        self._paused = paused

    _paused = False

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._paused or not (module.training and torch.is_grad_enabled()):
            return
        if self._example is None:
            self._example = self._inputs(args, kwargs)
        if self.kgt is None:
            return
        self.kgt.freezer.enforce()
        wanted = self.kgt.wanted() if self._offer is None else ()
        if wanted:
            units = {index: self.kgt.plan.modules[index].units[-1] for index in wanted}
            self._arriving = self._inputs(args, kwargs)
            self._capture = Capture(module, units, self.config.gram_rows)
            self._capture.__enter__()

    def _inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Inputs:
        """The sub-sampled tensors of a call; scalars (such as a count of items) have no rows."""
        rows = self.config.gram_rows
        named = {name: v for name, v in kwargs.items() if isinstance(v, Tensor) and v.dim()}
        if named:
            return {name: value.detach()[:rows] for name, value in named.items()}
        return tuple(v.detach()[:rows] for v in args if isinstance(v, Tensor) and v.dim())

    def _after(self, module: nn.Module, args: Any, out: Any) -> None:
        loss = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
        if isinstance(loss, Tensor) and module.training:
            self.last_loss = float(loss.detach())
        capture, self._capture = self._capture, None
        if capture is None or self.kgt is None or self._arriving is None:
            return
        capture.__exit__(None)
        grams = {index: gram(value) for index, value in capture.outputs.items()}
        self._offer = Offer(self.kgt.steps, self.kgt.rate(), self._arriving, 0, grams)

    def step(self, loss: Tensor | float | None = None, epoch: int = 0) -> None:
        """One optimizer step is done; ``loss`` by default is what the model returned."""
        if self.kgt is None:
            if self._example is not None:
                self._build()
            return
        value = self.last_loss if loss is None else float(loss)
        self.kgt.epoch = epoch
        offer, self._offer = self._offer, None
        if offer is not None and math.isfinite(value):
            self.kgt.offer(offer)
        self.kgt.step(value)

    def state_dict(self) -> dict[str, Any] | None:
        """State for a checkpoint; None before the first batch."""
        if self.kgt is None:
            return None
        return {"example": self._example, "kgt": self.kgt.state_dict()}

    def close(self) -> None:
        """Take the hooks off the model; what is frozen stays frozen. May be called twice."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self.kgt is not None:
            self.kgt.close()
