"""The blocks that FedTrans transforms: dense, residual dense, convolution, residual, depthwise.

Each cell is a frozen value that knows its parameters (shape and meaning of axes), its cost, its
module, how it looks when wider, and which cell deepens it without changing the function
(section 3.3).
Attention is in :mod:`attention`.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from raysys.config import check, check_choice, check_range
from raysys.errors import ConfigError
from raysys.federated.fedtrans.signal import Axis, Signal, Space, TensorInfo

Array = npt.NDArray[np.float32]
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


class Cell(Protocol):
    """The smallest transformable block."""

    def after(self, signal: Signal, index: int) -> Signal:
        """What leaves the cell when ``signal`` enters it as number ``index`` of its network."""
        ...

    def tensors(self, signal: Signal, index: int) -> list[TensorInfo]:
        """Its parameters, in the order of its module's."""
        ...

    def macs(self, signal: Signal) -> int:
        """Multiply-accumulates of one sample's forward pass."""
        ...

    def module(self, signal: Signal) -> nn.Module:
        """A freshly initialised module."""
        ...

    def spaces(self) -> dict[str, Space]:
        """The spaces that it owns, by part; empty if its width is not its own."""
        ...

    def widened(self, sizes: dict[str, int]) -> Cell:
        """The same cell with other sizes of its spaces."""
        ...

    def deepening(self, signal: Signal) -> Cell:
        """The cell to insert behind this one; ``signal`` is what leaves this one."""
        ...

    def identity(self, signal: Signal, start: list[Array], rng: np.random.Generator) -> list[Array]:
        """Parameters with which the cell, when inserted behind its own kind, changes nothing.

        Args:
            start: freshly drawn parameters, from which what may be random is kept.
        """
        ...


def check_image(signal: Signal, cell: str) -> None:
    """Raise a ConfigError where a cell for images gets something else."""
    if len(signal.shape) != 3:
        raise ConfigError(f"cells.{cell}", signal.shape, "an image [C, H, W] as its input")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Dense:
    """Linear layer and activation; an image or tokens are flattened first."""

    width: int
    activation: str = "relu"

    def __post_init__(self) -> None:
        check_range(self, "width", 1)
        check_choice(self, "activation", tuple(ACTIVATIONS))

    def after(self, signal: Signal, index: int) -> Signal:
        return Signal((self.width,), (index, "out"))

    def tensors(self, signal: Signal, index: int) -> list[TensorInfo]:
        flat = signal.flat()
        own = Axis((index, "out"))
        weight = TensorInfo((self.width, flat.width), (own, flat.axis("in")))
        return [weight, TensorInfo((self.width,), (own,))]

    def macs(self, signal: Signal) -> int:
        return self.width * signal.flat().width

    def module(self, signal: Signal) -> nn.Module:
        linear = nn.Linear(signal.flat().width, self.width)
        return nn.Sequential(nn.Flatten(), linear, ACTIVATIONS[self.activation]())

    def spaces(self) -> dict[str, Space]:
        return {"out": Space(self.width)}

    def widened(self, sizes: dict[str, int]) -> Cell:
        return dataclasses.replace(self, width=sizes["out"])

    def deepening(self, signal: Signal) -> Cell:
        # ReLU leaves only values >= 0, which a ReLU of the identity passes on; others need x + 0.
        if self.activation == "relu":
            return Dense(width=self.width)
        return DenseResidual(inner=self.width, activation=self.activation)

    def identity(self, signal: Signal, start: list[Array], rng: np.random.Generator) -> list[Array]:
        eye = np.eye(self.width, dtype=np.float32)
        return [eye, np.zeros(self.width, dtype=np.float32)]


class _ResidualDenseModule(nn.Module):
    def __init__(self, width: int, inner: int, activation: str) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x_BF: Tensor) -> Tensor:
        """``x + V f(U x)``."""
        added: Tensor = self.down(self.activation(self.up(x_BF)))
        return x_BF + added


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DenseResidual:
    """``x + V f(U x)`` on a vector; its inner width is its own, the trunk's is not."""

    inner: int
    activation: str = "relu"

    def __post_init__(self) -> None:
        check_range(self, "inner", 1)
        check_choice(self, "activation", tuple(ACTIVATIONS))

    def after(self, signal: Signal, index: int) -> Signal:
        return signal.flat()

    def tensors(self, signal: Signal, index: int) -> list[TensorInfo]:
        flat, key = signal.flat(), (index, "inner")
        return [
            TensorInfo((self.inner, flat.width), (Axis(key), flat.axis("in"))),
            TensorInfo((self.inner,), (Axis(key),)),
            TensorInfo((flat.width, self.inner), (flat.axis("out"), Axis(key, "in"))),
            TensorInfo((flat.width,), (flat.axis("out"),)),
        ]

    def macs(self, signal: Signal) -> int:
        return 2 * self.inner * signal.flat().width

    def module(self, signal: Signal) -> nn.Module:
        inner = _ResidualDenseModule(signal.flat().width, self.inner, self.activation)
        return nn.Sequential(nn.Flatten(), inner)

    def spaces(self) -> dict[str, Space]:
        return {"inner": Space(self.inner)}

    def widened(self, sizes: dict[str, int]) -> Cell:
        return dataclasses.replace(self, inner=sizes["inner"])

    def deepening(self, signal: Signal) -> Cell:
        return self

    def identity(self, signal: Signal, start: list[Array], rng: np.random.Generator) -> list[Array]:
        return [start[0], start[1], np.zeros_like(start[2]), np.zeros_like(start[3])]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Conv:
    """Convolution (stride 1, same size), optional group norm, ReLU, optional 2x2 max-pooling.

    Args:
        group_size: channels per group of the norm; 0 for none. Widening copies whole groups.
    """

    channels: int
    kernel: int = 3
    group_size: int = 0
    pool: bool = False

    def __post_init__(self) -> None:
        check_range(self, "channels", 1)
        check(self, "kernel", self.kernel >= 1 and self.kernel % 2 == 1, "an odd number")
        whole = self.group_size >= 0 and (
            not self.group_size or not self.channels % self.group_size
        )
        check(self, "group_size", whole, "0 or a divisor of the channels")

    def after(self, signal: Signal, index: int) -> Signal:
        check_image(signal, "conv")
        scale = 2 if self.pool else 1
        shape = (self.channels, signal.shape[1] // scale, signal.shape[2] // scale)
        if min(shape) < 1:
            raise ConfigError("cells.pool", signal.shape, "images of at least 2x2 before pooling")
        return Signal(shape, (index, "out"))

    def tensors(self, signal: Signal, index: int) -> list[TensorInfo]:
        check_image(signal, "conv")
        own, k = Axis((index, "out")), self.kernel
        shape = (self.channels, signal.width, k, k)
        found = [TensorInfo(shape, (own, signal.axis("in"), Axis(), Axis()))]
        per_channel = 3 if self.group_size else 1
        return found + [TensorInfo((self.channels,), (own,))] * per_channel

    def macs(self, signal: Signal) -> int:
        check_image(signal, "conv")
        return self.channels * signal.width * self.kernel**2 * signal.shape[1] * signal.shape[2]

    def module(self, signal: Signal) -> nn.Module:
        check_image(signal, "conv")
        convolution = nn.Conv2d(signal.width, self.channels, self.kernel, padding=self.kernel // 2)
        layers: list[nn.Module] = [convolution]
        if self.group_size:
            layers.append(nn.GroupNorm(self.channels // self.group_size, self.channels))
        layers.append(nn.ReLU())
        return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if self.pool else []))

    def spaces(self) -> dict[str, Space]:
        return {"out": Space(self.channels, max(1, self.group_size))}

    def widened(self, sizes: dict[str, int]) -> Cell:
        return dataclasses.replace(self, channels=sizes["out"])

    def deepening(self, signal: Signal) -> Cell:
        # A norm of the identity is not the identity: with one, deepen by a residual block.
        if self.group_size:
            return ResidualConv(inner=self.channels, kernel=self.kernel, group_size=self.group_size)
        return Conv(channels=self.channels, kernel=self.kernel)

    def identity(self, signal: Signal, start: list[Array], rng: np.random.Generator) -> list[Array]:
        delta = np.zeros_like(start[0])
        middle = self.kernel // 2
        delta[np.arange(self.channels), np.arange(self.channels), middle, middle] = 1.0
        return [delta, np.zeros_like(start[1])]


class _ResidualConvModule(nn.Module):
    def __init__(self, channels: int, cell: ResidualConv) -> None:
        super().__init__()
        pad = cell.kernel // 2
        self.first = nn.Conv2d(channels, cell.inner, cell.kernel, padding=pad)
        self.norm = (
            nn.GroupNorm(cell.inner // cell.group_size, cell.inner)
            if cell.group_size
            else nn.Identity()
        )
        self.last = nn.Conv2d(cell.inner, channels, cell.kernel, padding=pad)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """``x + conv(relu(norm(conv(x))))``."""
        added: Tensor = self.last(torch.relu(self.norm(self.first(x_BCHW))))
        return x_BCHW + added


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ResidualConv:
    """Residual block of two convolutions; the inner width is its own, the trunk's the stage's."""

    inner: int
    kernel: int = 3
    group_size: int = 0

    def __post_init__(self) -> None:
        check_range(self, "inner", 1)
        check(self, "kernel", self.kernel >= 1 and self.kernel % 2 == 1, "an odd number")
        whole = self.group_size >= 0 and (not self.group_size or not self.inner % self.group_size)
        check(self, "group_size", whole, "0 or a divisor of the inner width")

    def after(self, signal: Signal, index: int) -> Signal:
        check_image(signal, "residual_conv")
        return signal

    def tensors(self, signal: Signal, index: int) -> list[TensorInfo]:
        check_image(signal, "residual_conv")
        key, k, width = (index, "inner"), self.kernel, signal.width
        own = Axis(key)
        first = TensorInfo((self.inner, width, k, k), (own, signal.axis("in"), Axis(), Axis()))
        last_axes = (signal.axis("out"), Axis(key, "in"), Axis(), Axis())
        per_unit = [TensorInfo((self.inner,), (own,))] * (3 if self.group_size else 1)
        return [
            first,
            *per_unit,
            TensorInfo((width, self.inner, k, k), last_axes),
            TensorInfo((width,), (signal.axis("out"),)),
        ]

    def macs(self, signal: Signal) -> int:
        check_image(signal, "residual_conv")
        return 2 * self.inner * signal.width * self.kernel**2 * signal.shape[1] * signal.shape[2]

    def module(self, signal: Signal) -> nn.Module:
        check_image(signal, "residual_conv")
        return _ResidualConvModule(signal.width, self)

    def spaces(self) -> dict[str, Space]:
        return {"inner": Space(self.inner, max(1, self.group_size))}

    def widened(self, sizes: dict[str, int]) -> Cell:
        return dataclasses.replace(self, inner=sizes["inner"])

    def deepening(self, signal: Signal) -> Cell:
        return self

    def identity(self, signal: Signal, start: list[Array], rng: np.random.Generator) -> list[Array]:
        return [*start[:-2], np.zeros_like(start[-2]), np.zeros_like(start[-1])]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Depthwise:
    """Depthwise convolution and ReLU; it has no width of its own and cannot be widened alone."""

    kernel: int = 3

    def __post_init__(self) -> None:
        check(self, "kernel", self.kernel >= 1 and self.kernel % 2 == 1, "an odd number")

    def after(self, signal: Signal, index: int) -> Signal:
        check_image(signal, "depthwise")
        return signal

    def tensors(self, signal: Signal, index: int) -> list[TensorInfo]:
        check_image(signal, "depthwise")
        shape = (signal.width, 1, self.kernel, self.kernel)
        channel = signal.axis("out")
        return [
            TensorInfo(shape, (channel, Axis(), Axis(), Axis())),
            TensorInfo((signal.width,), (channel,)),
        ]

    def macs(self, signal: Signal) -> int:
        check_image(signal, "depthwise")
        return signal.width * self.kernel**2 * signal.shape[1] * signal.shape[2]

    def module(self, signal: Signal) -> nn.Module:
        check_image(signal, "depthwise")
        width, k = signal.width, self.kernel
        return nn.Sequential(nn.Conv2d(width, width, k, padding=k // 2, groups=width), nn.ReLU())

    def spaces(self) -> dict[str, Space]:
        return {}

    def widened(self, sizes: dict[str, int]) -> Cell:
        return self

    def deepening(self, signal: Signal) -> Cell:
        return self

    def identity(self, signal: Signal, start: list[Array], rng: np.random.Generator) -> list[Array]:
        delta = np.zeros_like(start[0])
        delta[:, 0, self.kernel // 2, self.kernel // 2] = 1.0
        return [delta, np.zeros_like(start[1])]
