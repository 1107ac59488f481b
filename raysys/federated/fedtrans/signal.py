"""What flows between cells, and what the axes of a tensor mean: the vocabulary of widening.

A *space* is a set of units that are widened together (the channels of a convolution, the heads of
an attention block, the trunk of a residual stage). Every axis of every parameter says which space
it indexes and in which role, so that widening is one rule for all kinds of cells.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

SpaceKey = tuple[int, str]


@dataclasses.dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a parameter.

    Args:
        space: (cell, part) whose units the axis indexes; None for an axis of fixed size.
        role: "out" axes are copied with their unit, "in" axes also scaled by its share.
        block: consecutive entries per unit (pixels of a flattened channel, width of a head).
    """

    space: SpaceKey | None = None
    role: Literal["out", "in"] = "out"
    block: int = 1


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and meaning of one parameter of a cell."""

    shape: tuple[int, ...]
    axes: tuple[Axis, ...]

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True, slots=True)
class Signal:
    """The activations between two cells, without the batch.

    Args:
        shape: (F,) a vector, (C, H, W) an image, or (T, D) tokens.
        space: whose units the channels are; None for the data's own.
        block: entries of a vector per unit of ``space``.
    """

    shape: tuple[int, ...]
    space: SpaceKey | None = None
    block: int = 1

    @property
    def width(self) -> int:
        """Channels of an image, dimensions of tokens, entries of a vector."""
        return self.shape[-1] if len(self.shape) == 2 else self.shape[0]

    def flat(self) -> Signal:
        """The same activations as a vector, channel by channel."""
        if len(self.shape) == 1:
            return self
        return Signal((math.prod(self.shape),), self.space, math.prod(self.shape[1:]))

    def axis(self, role: Literal["out", "in"]) -> Axis:
        """The axis of a parameter that reads or writes this signal's channels."""
        return Axis(self.space, role, self.block)


@dataclasses.dataclass(frozen=True, slots=True)
class Space:
    """Size of a space, and of the groups in which its units must be copied."""

    size: int
    group: int = 1
