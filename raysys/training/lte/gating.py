"""Routers and gates in a live model: which experts of each FFN take part, for every token.

A gate hangs two hooks into an FFN: one sees its input x and asks the router for the logits z, the
other multiplies the activated hidden vector by the selection's weights. So one mechanism serves
every architecture, training under recomputation included: hooks only note z, losses are
computed outside.
Dimensions: T tokens, D hidden, F neurons, N experts of E neurons, L layers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from raysys.training.lte.adapters import FFN, find_ffns
from raysys.training.lte.config import ConvertConfig, threshold_logit
from raysys.training.lte.errors import LTEConfigError
from raysys.training.lte.grouping import expert_count

Mode = Literal["dense", "soft", "hard", "hard_scaled", "topk"]
MODES = ("dense", "soft", "hard", "hard_scaled", "topk")


class Router(nn.Module):
    """One linear map to the experts' logits, always in float32 (section 4.1).

    Args:
        hidden, experts: D and N.
        bias: whether there is a bias per expert; the paper has none.
    """

    def __init__(self, hidden: int, experts: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(experts, dtype=torch.float32)) if bias else None

    def start(self, config: ConvertConfig, layer: int) -> None:
        """Initialise; the same values for the same seed and layer on every machine."""
        generator = torch.Generator().manual_seed(config.seed * 100_003 + layer)
        with torch.no_grad():
            if config.router_init == "default":
                bound = 1.0 / math.sqrt(self.weight.shape[1])
                self.weight.uniform_(-bound, bound, generator=generator)
            else:
                self.weight.normal_(0.0, 0.01, generator=generator)
            if self.bias is not None:
                self.bias.fill_(config.warm_bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Logits z, float32 [..., N]; autocast does not reach in here."""
        with torch.autocast(x_TD.device.type, enabled=False):
            return nn.functional.linear(x_TD.float(), self.weight, self.bias)


class Gate:
    """The selection in one FFN; see the module."""

    def __init__(self, ffn: FFN, expert_size: int, threshold: float) -> None:
        self.ffn = ffn
        self.expert_size = expert_size
        self.experts = expert_count(ffn.neurons, expert_size)
        self.threshold = threshold_logit(threshold)
        self.offset = 0.0
        self.mode: Mode = "dense"
        self.top = self.experts
        self.selector: Selector | None = None
        self.record: list[tuple[Tensor, Tensor]] | None = None
        self._x: Tensor | None = None
        self._hooks = [
            ffn.entry.register_forward_pre_hook(self._enter),
            ffn.output.register_forward_pre_hook(self._leave),
        ]

    @property
    def router(self) -> Router:
        router = self.ffn.entry.router
        assert isinstance(router, Router)
        return router

    def close(self) -> None:
        """Take the hooks away; may be called twice."""
        for hook in self._hooks:
            hook.remove()

    def weights(self, x: Tensor, z: Tensor, a: Tensor) -> Tensor | None:
        """Weights of the experts, float32 [..., N] (a selector's may be [..., F]); None: all on."""
        if self.selector is not None:
            return self.selector(x, z, a, self)
        if self.mode == "dense":
            return None
        if self.mode == "soft":
            return torch.sigmoid(z)
        if self.mode == "topk":
            return top_mask(z, self.top)
        hard = (z > self.threshold + self.offset).float()
        return hard * torch.sigmoid(z) if self.mode == "hard_scaled" else hard

    def _enter(self, _module: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._x = arguments[0]

    def _leave(self, _module: nn.Module, arguments: tuple[Any, ...]) -> Any:
        a, x, self._x = arguments[0], self._x, None
        if x is None:
            raise RuntimeError(f"{self.ffn.path}: the output projection ran without its FFN")
        if self.mode == "dense" and self.selector is None:
            return None
        z = self.router(x)
        weights = self.weights(x, z, a)
        if self.record is not None:
            self.record.append((z, _as_experts(weights, z)))
        if weights is None:
            return None
        return (scale(a, weights), *arguments[1:])


# (x [T, D], z [T, N], a [T, F], gate) -> weights [T, N] or [T, F], or None for "all on".
Selector = Callable[[Tensor, Tensor, Tensor, Gate], Tensor | None]


def scale(a: Tensor, weights: Tensor) -> Tensor:
    """Multiply the hidden vector [..., F] by weights [..., N] or [..., F]."""
    if weights.shape[-1] == a.shape[-1]:
        return a * weights.to(a.dtype)
    size = a.shape[-1] // weights.shape[-1]
    grouped = a.reshape(*a.shape[:-1], weights.shape[-1], size)
    return (grouped * weights.to(a.dtype).unsqueeze(-1)).reshape(a.shape)


def top_mask(scores: Tensor, top: int) -> Tensor:
    """1.0 at the ``top`` largest entries of the last axis, else 0; ties by index."""
    chosen = scores.topk(max(0, min(top, scores.shape[-1])), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.float32).scatter_(-1, chosen, 1.0)


def _as_experts(weights: Tensor | None, z: Tensor) -> Tensor:
    return torch.ones_like(z) if weights is None else weights


class SparseModel:
    """A Hugging Face model with a gate in every FFN.

    Attributes:
        model: the model itself; its parameters include the routers'.
        gates: one per FFN, in order.
    """

    def __init__(self, model: nn.Module, config: ConvertConfig) -> None:
        """Add fresh routers where there are none and hang in the gates.

        Raises:
            LTEConfigError, LTEDataError: the model cannot be converted, or already was.
        """
        self.model = model
        self.config = config
        ffns = find_ffns(model)
        for ffn in ffns:
            experts = expert_count(ffn.neurons, config.expert_size)
            if not hasattr(ffn.entry, "router"):
                router = Router(ffn.hidden, experts, bias=config.router_bias)
                router.start(config, ffn.index)
                ffn.entry.router = router.to(ffn.rows(0).device)
            elif not isinstance(ffn.entry.router, Router):
                raise LTEConfigError(f"{ffn.path}.router", type(ffn.entry.router), "no router")
        self.gates = [Gate(ffn, config.expert_size, config.threshold) for ffn in ffns]

    @property
    def routers(self) -> list[Router]:
        return [gate.router for gate in self.gates]

    @property
    def experts(self) -> int:
        """Experts of all layers together."""
        return sum(gate.experts for gate in self.gates)

    def set_mode(self, mode: Mode, *, offset: float = 0.0, top: int | None = None) -> None:
        """Choose the selection in every layer.

        Raises:
            LTEConfigError: there is no such mode.
        """
        if mode not in MODES:
            raise LTEConfigError("mode", mode, f"one of {MODES}")
        for gate in self.gates:
            gate.mode, gate.offset, gate.selector = mode, offset, None
            gate.top = gate.experts if top is None else top

    def set_selectors(self, selectors: Sequence[Selector]) -> None:
        """Give every layer a selection of its own (the baselines)."""
        for gate, selector in zip(self.gates, selectors, strict=True):
            gate.selector = selector

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[list[tuple[Tensor, Tensor]]]]:
        """Collect (z, weights) of every forward pass, one list per layer, while the block runs."""
        records: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.gates]
        for gate, record in zip(self.gates, records):
            gate.record = record
        try:
            yield records
        finally:
            for gate in self.gates:
                gate.record = None

    def close(self) -> None:
        """Take all hooks away; the routers stay in the model."""
        for gate in self.gates:
            gate.close()


@dataclasses.dataclass(slots=True)
class SparsityCount:
    """Running counts of active (token, layer, expert) triples over valid tokens."""

    active: Tensor
    possible: Tensor

    @classmethod
    def empty(cls, layers: int) -> SparsityCount:
        return cls(
            torch.zeros(layers, dtype=torch.float64), torch.zeros(layers, dtype=torch.float64)
        )

    def add(self, layer: int, weights: Tensor, valid: Tensor | None = None) -> None:
        """Count one layer's weights [..., N]; ``valid`` is a bool mask of the leading axes."""
        on = (weights != 0).flatten(0, -2)
        if valid is not None:
            on = on[valid.flatten()]
        self.active[layer] += on.sum(dtype=torch.float64).cpu()
        self.possible[layer] += on.numel()

    @property
    def per_layer(self) -> list[float]:
        """Sparsity of each layer; 0 where nothing was counted."""
        share = self.active / self.possible.clamp_min(1)
        return [1.0 - float(value) if total else 0.0 for value, total in zip(share, self.possible)]

    @property
    def overall(self) -> float:
        """Sparsity over all layers."""
        total = float(self.possible.sum())
        return 1.0 - float(self.active.sum()) / total if total else 0.0
