"""Transformer cells: a patch stem and a pre-norm attention block.

The trunk carries a LayerNorm and is never widened (its statistics would change); the block grows by
heads and by the inner width of its MLP, both with shares like any other space.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor, nn

from raysys.config import check_range
from raysys.errors import ConfigError
from raysys.federated.fedtrans.cells import Array, Cell, check_image
from raysys.federated.fedtrans.signal import Axis, Signal, Space, TensorInfo


class _PatchModule(nn.Module):
    def __init__(self, channels: int, tokens: int, cell: Patches) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, cell.dim, cell.patch, stride=cell.patch)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, cell.dim))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Tokens [B, T, D]."""
        tokens: Tensor = self.project(x_BCHW).flatten(2).transpose(1, 2)
        return tokens + self.position


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Patches:
    """Cuts an image into square patches and embeds them as tokens; it is never transformed."""

    patch: int
    dim: int

    def __post_init__(self) -> None:
        check_range(self, "patch", 1)
        check_range(self, "dim", 1)

    def after(self, signal: Signal, index: int) -> Signal:
        check_image(signal, "patches")
        tokens = (signal.shape[1] // self.patch) * (signal.shape[2] // self.patch)
        if tokens < 1:
            raise ConfigError("cells.patch", self.patch, f"at most the image's {signal.shape[1:]}")
        return Signal((tokens, self.dim))

    def tensors(self, signal: Signal, index: int) -> list[TensorInfo]:
        tokens = self.after(signal, index).shape[0]
        shape = (self.dim, signal.width, self.patch, self.patch)
        read = (Axis(), signal.axis("in"), Axis(), Axis())
        # A module's own parameters come before those of its children.
        return [
            TensorInfo((tokens, self.dim), (Axis(), Axis())),
            TensorInfo(shape, read),
            TensorInfo((self.dim,), (Axis(),)),
        ]

    def macs(self, signal: Signal) -> int:
        tokens = self.after(signal, 0).shape[0]
        return tokens * self.dim * signal.width * self.patch**2

    def module(self, signal: Signal) -> nn.Module:
        return _PatchModule(signal.width, self.after(signal, 0).shape[0], self)

    def spaces(self) -> dict[str, Space]:
        return {}

    def widened(self, sizes: dict[str, int]) -> Cell:
        return self

    def deepening(self, signal: Signal) -> Cell:
        raise ConfigError("cells", "patches", "a cell behind the stem to deepen")

    def identity(self, signal: Signal, start: list[Array], rng: np.random.Generator) -> list[Array]:
        raise ConfigError("cells", "patches", "a cell behind the stem to deepen")


class _AttentionModule(nn.Module):
    def __init__(self, dim: int, cell: Attention) -> None:
        super().__init__()
        self.heads, self.head_dim = cell.heads, cell.head_dim
        inner = cell.heads * cell.head_dim
        self.norm_attention = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, inner)
        self.key = nn.Linear(dim, inner)
        self.value = nn.Linear(dim, inner)
        self.project = nn.Linear(inner, dim)
        self.norm_mlp = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, cell.mlp)
        self.down = nn.Linear(cell.mlp, dim)

    def _split(self, x_BTI: Tensor) -> Tensor:
        shape = (*x_BTI.shape[:-1], self.heads, self.head_dim)
        return x_BTI.reshape(shape).transpose(-3, -2)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Attention, then the MLP, each added to the trunk."""
        normed = self.norm_attention(x_BTD)
        query, key, value = (
            self._split(part(normed)) for part in (self.query, self.key, self.value)
        )
        weights = (query @ key.transpose(-2, -1) / math.sqrt(self.head_dim)).softmax(dim=-1)
        mixed = (weights @ value).transpose(-3, -2).flatten(-2)
        x_BTD = x_BTD + self.project(mixed)
        added: Tensor = self.down(torch.relu(self.up(self.norm_mlp(x_BTD))))
        return x_BTD + added


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Pre-norm self-attention and MLP on tokens; any number of heads."""

    heads: int
    head_dim: int
    mlp: int

    def __post_init__(self) -> None:
        for name in ("heads", "head_dim", "mlp"):
            check_range(self, name, 1)

    def after(self, signal: Signal, index: int) -> Signal:
        if len(signal.shape) != 2:
            raise ConfigError("cells.attention", signal.shape, "tokens [T, D]", "Put Patches first")
        return signal

    def tensors(self, signal: Signal, index: int) -> list[TensorInfo]:
        dim = self.after(signal, index).width
        inner = self.heads * self.head_dim
        heads_out = Axis((index, "heads"), "out", self.head_dim)
        heads_in = Axis((index, "heads"), "in", self.head_dim)
        mlp_out, mlp_in = Axis((index, "mlp")), Axis((index, "mlp"), "in")
        trunk = TensorInfo((dim,), (Axis(),))
        into = [
            TensorInfo((inner, dim), (heads_out, Axis())),
            TensorInfo((inner,), (heads_out,)),
        ]
        return [
            trunk, trunk, *into, *into, *into,
            TensorInfo((dim, inner), (Axis(), heads_in)), trunk,
            trunk, trunk,
            TensorInfo((self.mlp, dim), (mlp_out, Axis())),
            TensorInfo((self.mlp,), (mlp_out,)),
            TensorInfo((dim, self.mlp), (Axis(), mlp_in)), trunk,
        ]  # fmt: skip

    def macs(self, signal: Signal) -> int:
        tokens, dim = signal.shape
        inner = self.heads * self.head_dim
        return tokens * (4 * dim * inner + 2 * dim * self.mlp) + 2 * tokens * tokens * inner

    def module(self, signal: Signal) -> nn.Module:
        return _AttentionModule(self.after(signal, 0).width, self)

    def spaces(self) -> dict[str, Space]:
        return {"heads": Space(self.heads), "mlp": Space(self.mlp)}

    def widened(self, sizes: dict[str, int]) -> Cell:
        return dataclasses.replace(self, heads=sizes["heads"], mlp=sizes["mlp"])

    def deepening(self, signal: Signal) -> Cell:
        return self

    def identity(self, signal: Signal, start: list[Array], rng: np.random.Generator) -> list[Array]:
        silent = {8, 9, 14, 15}  # both projections back to the trunk
        return [np.zeros_like(t) if n in silent else t for n, t in enumerate(start)]
