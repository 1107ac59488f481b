"""CIFAR-size blocks of the three networks that Swan's paper trains."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

BATCH = 16


class Residual(nn.Module):
    """``relu(x + f(x))``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as ``x``."""
        return torch.relu(x + self.inner(x))


class Shuffle(nn.Module):
    """ShuffleNetV2 unit: half of the channels through a branch, then a channel shuffle."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            *_conv(half, half, 1), *_conv(half, half, 3, groups=half)[:2], *_conv(half, half, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as ``x``."""
        kept, rest = x.chunk(2, dim=1)
        n, c, h, w = x.shape
        out = torch.cat([kept, self.branch(rest)], dim=1)
        return out.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def resnet() -> nn.Module:
    """Two basic blocks of ResNet-34's first stage, 64 channels."""
    block = [Residual(nn.Sequential(*_conv(64, 64, 3), *_conv(64, 64, 3)[:2])) for _ in range(2)]
    return _net(64, block)


def mobilenet() -> nn.Module:
    """Three inverted residuals of MobileNetV2, 32 channels expanded six times."""
    blocks = [
        Residual(
            nn.Sequential(
                *_conv(32, 192, 1), *_conv(192, 192, 3, groups=192), *_conv(192, 32, 1)[:2]
            )
        )
        for _ in range(3)
    ]
    return _net(32, blocks)


def shufflenet() -> nn.Module:
    """Four units of ShuffleNetV2, 116 channels."""
    return _net(116, [Shuffle(116) for _ in range(4)])


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet": resnet,
    "MobileNetV2": mobilenet,
    "ShuffleNetV2": shufflenet,
}


class Training:
    """A network with an optimiser and one batch; ``step`` is an ordinary training step."""

    def __init__(self, name: str, batch: int = BATCH) -> None:
        torch.manual_seed(0)
        self.model = NETWORKS[name]()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.inputs, self.labels = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))

    def step(self) -> None:
        """Forward, backward, update."""
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(self.inputs), self.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def _net(channels: int, blocks: list[Residual] | list[Shuffle]) -> nn.Module:
    stem = [*_conv(3, channels, 3), nn.MaxPool2d(2)]
    return nn.Sequential(
        *stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)
    )


def _conv(inner: int, outer: int, size: int, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inner, outer, size, padding=size // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outer), nn.ReLU()]
