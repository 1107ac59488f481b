"""Freezing a prefix without touching the optimizer.

Parameters lose ``requires_grad`` and their gradient; torch optimizers then skip them, momentum and
weight decay included. Frozen blocks run in eval mode, so that BatchNorm uses its running statistics
and dropout does nothing (paper, section 4.3). What the user froze by hand stays frozen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from raysys.errors import ConfigError
from raysys.training.kgt.plan import ModulePlan


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse optimizers that move parameters without gradients.

    Raises:
        ConfigError: L-BFGS flattens all parameters into one vector and would move frozen ones.
    """
    if isinstance(optimizer, LBFGS):
        raise ConfigError(
            "optimizer", type(optimizer).__name__, "an optimizer that skips missing gradients",
            "Use SGD, Adam, AdamW or RMSprop",
        )  # fmt: skip


_SHARDED = ("FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine")

_WRAPPERS = {
    "DistributedDataParallel": "DistributedDataParallel",
    "OptimizedModule": "torch.compile",
}


def check_model(model: nn.Module) -> None:
    """Refuse models whose parameters are not whole on each rank, or that are wrapped too early.

    Wrappers are known by name, so that none of them is imported here.

    Raises:
        ConfigError: sharded parameters (FSDP, ZeRO), or a wrapper (data parallelism, compilation)
            around the model, which must be put on again whenever the frozen part changes.
    """
    for module in model.modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if kinds & set(_SHARDED):
            raise ConfigError(
                "model", type(module).__name__, "parameters that are whole on every rank",
                "Train data parallel: freezing inside FSDP or ZeRO is not supported",
            )  # fmt: skip
        for wrapper, way in _WRAPPERS.items():
            if wrapper in kinds:
                remedy = f"Pass the model and KGT(..., wrap={way})"
                raise ConfigError("model", type(module).__name__, "the model itself", remedy)


class Freezer:
    """Applies "modules 0 .. upto - 1 are frozen" to a model."""

    def __init__(self, model: nn.Module, plan: ModulePlan) -> None:
        self.model = model
        self.plan = plan
        self.upto = 0
        self._ours: dict[int, nn.Parameter] = {}
        self._modes: dict[int, tuple[nn.Module, bool]] = {}

    def apply(self, upto: int) -> None:
        """Freeze the first ``upto`` modules and release the others that we froze.

        Raises:
            ConfigError: ``upto`` would freeze the head or is negative.
        """
        if not 0 <= upto < len(self.plan):
            raise ConfigError("frozen_upto", upto, f"0 to {len(self.plan) - 1} (the head trains)")
        wanted = {id(p): p for module in self.plan.modules[:upto] for p in module.parameters}
        for key, parameter in list(self._ours.items()):
            if key not in wanted:
                parameter.requires_grad_(True)
                del self._ours[key]
        for key, parameter in wanted.items():
            parameter.grad = None
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                self._ours[key] = parameter
        self.upto = upto
        self._restore_modes()
        self.enforce()

    def enforce(self) -> None:
        """Put frozen blocks into eval mode again after the user called ``model.train()``."""
        for unit in self.units():
            if unit.training:
                for inner in unit.modules():
                    self._modes.setdefault(id(inner), (inner, inner.training))
                unit.eval()

    def units(self) -> list[nn.Module]:
        """The model's own modules in the frozen prefix."""
        return [
            self.model.get_submodule(name)
            for module in self.plan.modules[: self.upto]
            for name in module.units
        ]

    def snapshot(self) -> list[Tensor]:
        """Copies of all frozen parameters and buffers."""
        return [tensor.detach().clone() for tensor in self._tensors()]

    def unchanged(self, snapshot: Sequence[Tensor]) -> bool:
        """Whether every frozen parameter and buffer is bit-equal to a snapshot."""
        return all(torch.equal(now, before) for now, before in zip(self._tensors(), snapshot))

    def restore(self, snapshot: Sequence[Tensor]) -> None:
        """Put a snapshot's values back."""
        with torch.no_grad():
            for tensor, before in zip(self._tensors(), snapshot):
                tensor.copy_(before)

    def _tensors(self) -> list[Tensor]:
        found: list[Tensor] = []
        for module in self.plan.modules[: self.upto]:
            found += module.parameters
        for unit in self.units():
            found += unit.buffers()
        return found

    def _restore_modes(self) -> None:
        frozen = {id(inner) for unit in self.units() for inner in unit.modules()}
        for key, (inner, mode) in list(self._modes.items()):
            if key not in frozen:
                inner.training = mode
                del self._modes[key]
