"""Ready networks for training jobs, benchmarks and tests: residual nets in 1-D and 2-D, an encoder.

The residual nets follow He et al. (CVPR 2016, section 4.2): a stem, stages of two-convolution basic
blocks at growing width, and a linear head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raysys.errors import ConfigError

_CONV: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d}
_NORM: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}


class BasicBlock(nn.Module):
    """Two 3-convolutions with BatchNorm and a shortcut; the shortcut is 1x1 where shapes change."""

    def __init__(self, before: int, width: int, stride: int, dimensions: int) -> None:
        super().__init__()
        conv, norm = _CONV[dimensions], _NORM[dimensions]
        self.conv1 = conv(before, width, 3, stride=stride, padding=1, bias=False)
        self.norm1 = norm(width)
        self.conv2 = conv(width, width, 3, padding=1, bias=False)
        self.norm2 = norm(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != width:
            self.shortcut = nn.Sequential(
                conv(before, width, 1, stride=stride, bias=False), norm(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, before, ...) to (N, width, .../stride)."""
        inner = torch.relu(self.norm1(self.conv1(x)))
        out: Tensor = torch.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))
        return out


class ResNet(nn.Module):
    """Residual network for signals (N, C, L) or images (N, C, H, W).

    Args:
        widths: channels of each block, in order; a block with other channels than the one before
            it (the first excepted) halves the resolution.
        dimensions: 1 or 2.
        stem_stride: stride of the first convolution.
    """

    def __init__(
        self,
        classes: int,
        *,
        channels: int = 1,
        widths: Sequence[int] = (16, 16, 16, 32, 32, 32, 64, 64, 64),
        dimensions: int = 2,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        if dimensions not in _CONV:
            raise ConfigError("dimensions", dimensions, "1 or 2")
        if not widths:
            raise ConfigError("widths", widths, "at least one block")
        first = widths[0]
        self.stem = nn.Sequential(
            _CONV[dimensions](channels, first, 3, stride=stem_stride, padding=1, bias=False),
            _NORM[dimensions](first),
            nn.ReLU(),
        )
        before = [first, *widths[:-1]]
        self.blocks = nn.Sequential(
            *[
                BasicBlock(prior, width, 1 if prior == width else 2, dimensions)
                for prior, width in zip(before, widths)
            ]
        )
        self.head = nn.Linear(widths[-1], classes)
        self.axes = tuple(range(2, 2 + dimensions))

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs to logits (N, classes)."""
        out: Tensor = self.head(self.blocks(self.stem(x)).mean(self.axes))
        return out


def resnet20(classes: int = 10, channels: int = 1) -> ResNet:
    """ResNet-20: three stages of three blocks, widths 16, 32 and 64."""
    return ResNet(classes, channels=channels)


def resnet1d(classes: int = 10) -> ResNet:
    """The six-block 1-D net of the MNIST-1D task, widths 12, 12, 24, 24, 48, 48."""
    return ResNet(classes, widths=(12, 12, 24, 24, 48, 48), dimensions=1)


class EncoderBlock(nn.Module):
    """Pre-norm self-attention and feed-forward, plain layers only so that it can be quantised."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError("heads", heads, f"a divisor of the width {width}")
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, T, width) to the same shape."""
        rows, length, width = x.shape
        q, k, v = (
            part.reshape(rows, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        weight = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(width // self.heads), dim=-1)
        mixed = (weight @ v).transpose(1, 2).reshape(rows, length, width)
        x = x + self.dropout(self.out(mixed))
        x = x + self.dropout(self.down(torch.relu(self.up(self.norm2(x)))))
        return x


class Embedding(nn.Module):
    """Token plus learned position embedding."""

    def __init__(self, vocabulary: int, length: int, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(length, width) * 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Map token ids (N, T) to (N, T, width)."""
        out: Tensor = self.token(ids) + self.position[: ids.shape[1]]
        return out


class TextClassifier(nn.Module):
    """A small Transformer encoder over token ids (N, T) with a mean-pooled linear head."""

    def __init__(
        self,
        classes: int,
        *,
        vocabulary: int = 256,
        length: int = 128,
        width: int = 64,
        blocks: int = 4,
        heads: int = 4,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.embedding = Embedding(vocabulary, length, width)
        self.blocks = nn.ModuleList([EncoderBlock(width, heads, dropout) for _ in range(blocks)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        """Map token ids (N, T) to logits (N, classes)."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x).mean(1))
        return out
