"""Small networks that score data and try coresets out, several models in one program.

Models with their own weights, data and seeds are stacked as groups of one convolution: on one core
a step of eight stacked models takes about half the time of eight steps. Recipe of the CCS paper's
section 5.1 at small scale: SGD with Nesterov momentum, cosine rate to the last step and not past
it (the released code steps its schedule beyond the end, where the rate climbs again).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from raysys.config import check, check_range
from raysys.errors import ConfigError
from raysys.training.ccs.accumulator import ScoreAccumulator, ScoringConfig
from raysys.training.ccs.convergence import ScoringStopper
from raysys.training.ccs.dynamics import Margin, final_statistics
from raysys.training.ccs.recorder import DynamicsRecorder
from raysys.training.ccs.table import ScoreTable
from raysys.training.datasets import LabelledArrays

IntArray = NDArray[np.int64]
Progress = Callable[[int], None]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ProxyConfig:
    """Network and recipe of the proxy.

    Args:
        channels: width of each of the three layers.
        iterations: training steps of a coreset run (the same for every coreset size).
        score_iterations: steps of the scoring run, rounded up to whole epochs.
        batch: examples per step.
        lr, lr_end: cosine from ``lr`` to ``lr_end``.
    """

    channels: tuple[int, int, int] = (8, 16, 32)
    iterations: int = 600
    score_iterations: int = 1200
    batch: int = 128
    lr: float = 0.1
    lr_end: float = 1e-4
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        for field in ("iterations", "score_iterations"):
            check_range(self, field, 1)
        check_range(self, "batch", 2)
        check_range(self, "lr", 0, low_open=True)
        check_range(self, "lr_end", 0, self.lr)
        check_range(self, "weight_decay", 0)
        check(self, "channels", min(self.channels) >= 1, "three widths >= 1")


def cosine_lr(step: int, steps: int, high: float, low: float) -> float:
    """Rate at ``step`` of ``steps``: ``high`` at 0, ``low`` at the last step and ever after."""
    done = min(1.0, step / max(1, steps - 1))
    return low + (high - low) * (1 + math.cos(math.pi * done)) / 2


class StackedNet(nn.Module):
    """``models`` equal small networks side by side, for rows of ``shape`` and ``classes`` classes.

    (C, L) signals use 1-D convolutions of stride 2, (C, H, W) images 3x3 convolutions with two
    max-pools, (F,) vectors fully connected layers; each with BatchNorm and ReLU, then one linear
    layer. Legend: M models, B rows, D features.
    """

    def __init__(
        self, shape: Sequence[int], classes: int, channels: Sequence[int], seeds: Sequence[int]
    ) -> None:
        super().__init__()
        if not 1 <= len(shape) <= 3:
            raise ConfigError("shape", tuple(shape), "(F,), (C, L) or (C, H, W)")
        self.models = len(seeds)
        self.images = len(shape) == 3
        self.body = nn.Sequential(*_layers(shape, channels, self.models))
        with torch.no_grad():
            self.body.eval()  # a training pass would touch the running statistics
            rows = self.body(self._stack(torch.zeros(2, self.models, *shape)))
            self.body.train()
        self.width = rows[0].numel() // self.models
        self.weight_MDC = nn.Parameter(torch.empty(self.models, self.width, classes))
        self.bias_MC = nn.Parameter(torch.empty(self.models, classes))
        self._initialise(seeds)

    def features(self, x_BM: torch.Tensor) -> torch.Tensor:
        """Penultimate features (M, B, D) of inputs (B, M, ...)."""
        hidden = self.body(self._stack(x_BM))
        features: torch.Tensor = hidden.reshape(len(x_BM), self.models, -1).transpose(0, 1)
        return features

    def forward(self, x_BM: torch.Tensor) -> torch.Tensor:
        """Logits (M, B, C) of inputs (B, M, ...): model ``m`` sees ``x_BM[:, m]``."""
        logits: torch.Tensor = torch.baddbmm(
            self.bias_MC[:, None], self.features(x_BM), self.weight_MDC
        )
        return logits

    def _stack(self, x_BM: torch.Tensor) -> torch.Tensor:
        x = x_BM.flatten(1, 2) if x_BM.ndim > 3 else x_BM.reshape(len(x_BM), -1, 1)
        return x.contiguous(memory_format=torch.channels_last) if self.images else x

    def _initialise(self, seeds: Sequence[int]) -> None:
        """Draw each model's weights from its own seed, whatever stack it is in."""
        with torch.no_grad():
            for index, seed in enumerate(seeds):
                generator = torch.Generator().manual_seed(seed)
                for layer in self.body:
                    if isinstance(layer, nn.Conv1d | nn.Conv2d):
                        bound = 1 / math.sqrt(layer.weight[0].numel())
                        for tensor in (layer.weight, layer.bias):
                            assert tensor is not None
                            part = tensor.chunk(self.models)[index]
                            part.uniform_(-bound, bound, generator=generator)
                bound = 1 / math.sqrt(self.width)
                self.weight_MDC[index].uniform_(-bound, bound, generator=generator)
                self.bias_MC[index].uniform_(-bound, bound, generator=generator)


def _layers(shape: Sequence[int], channels: Sequence[int], models: int) -> Iterator[nn.Module]:
    widths = (shape[0], *channels)
    for depth, (wide_in, wide_out) in enumerate(itertools.pairwise(widths)):
        into, out = wide_in * models, wide_out * models
        if len(shape) == 3:
            yield nn.Conv2d(into, out, 3, padding=1, groups=models)
            yield nn.BatchNorm2d(out)
        elif len(shape) == 2:
            kernel = 5 if depth == 0 else 3
            yield nn.Conv1d(into, out, kernel, stride=2, padding=1, groups=models)
            yield nn.BatchNorm1d(out)
        else:
            yield nn.Conv1d(into, out, 1, groups=models)
            yield nn.BatchNorm1d(out)
        yield nn.ReLU()
        if len(shape) == 3 and depth < 2:
            yield nn.MaxPool2d(2)


def train_stack(
    data: LabelledArrays,
    subsets: Sequence[IntArray],
    seeds: Sequence[int],
    config: ProxyConfig,
    progress: Progress | None = None,
) -> StackedNet:
    """Train one model per (rows, seed) pair for ``config.iterations`` steps each.

    Args:
        subsets: row positions of ``data`` that each model trains on.
        seeds: each model's seed, for weights and batch order.

    Raises:
        ConfigError: no model, an empty subset, or lengths that differ.
    """
    if not subsets or len(subsets) != len(seeds) or min(map(len, subsets)) == 0:
        raise ConfigError("subsets", len(subsets), f"{len(seeds)} subsets, none empty")
    net = StackedNet(data.x.shape[1:], data.classes, config.channels, seeds)
    optimizer = _optimizer(net, config)
    x, y = torch.from_numpy(data.x), torch.from_numpy(data.y)
    streams = [_stream(rows, seed, config.batch) for rows, seed in zip(subsets, seeds)]
    for step in range(config.iterations):
        rows_MB = torch.from_numpy(np.stack([next(stream) for stream in streams]))
        logits = net(x[rows_MB.t()])
        loss = functional.cross_entropy(logits.flatten(0, 1), y[rows_MB].flatten())
        # The mean over the stack times its size: each model gets the gradient of its own mean.
        _step(optimizer, loss * net.models, step, config.iterations, config)
        if progress:
            progress(step + 1)
    return net


def score_run(
    data: LabelledArrays,
    config: ProxyConfig,
    seed: int = 0,
    *,
    scoring: ScoringConfig | None = None,
    margin: Margin = "prob",
    stopper: ScoringStopper | None = None,
    progress: Progress | None = None,
) -> tuple[StackedNet, ScoreTable]:
    """Train once on everything, recording dynamics; returns the network and the six scores.

    Args:
        stopper: ends the run at an epoch's end once AUM's order has settled.
    """
    net = StackedNet(data.x.shape[1:], data.classes, config.channels, [seed])
    optimizer = _optimizer(net, config)
    accumulator = ScoreAccumulator(data.ids, scoring)
    recorder = DynamicsRecorder(accumulator.add, margin=margin)
    x, y = torch.from_numpy(data.x), torch.from_numpy(data.y)
    ids = torch.from_numpy(data.ids)
    per_epoch = math.ceil(len(data) / config.batch)
    epochs = math.ceil(config.score_iterations / per_epoch)
    rng = np.random.default_rng(seed)
    for step in range(epochs * per_epoch):
        epoch, place = divmod(step, per_epoch)
        if place == 0:
            recorder.start_epoch(epoch)
            # Parts of nearly equal size: a last batch of one row would break BatchNorm.
            parts = np.array_split(rng.permutation(len(data)), per_epoch)
        rows = torch.from_numpy(parts[place])
        logits = net(x[rows][:, None])[0]
        recorder.record(ids[rows], logits, y[rows])
        loss = functional.cross_entropy(logits, y[rows])
        _step(optimizer, loss, step, epochs * per_epoch, config)
        if place == per_epoch - 1:
            recorder.flush()
            accumulator.commit(epoch)
            if stopper is not None and stopper.update(accumulator.running_aum()):
                break
        if progress:
            progress(step + 1)
    by_id = np.argsort(data.ids, kind="stable")
    entropy, loss_rows = final_scores(net, data.take(by_id))
    table = accumulator.to_table({"entropy": entropy, "loss": loss_rows})
    return net, dataclasses.replace(table, features=features_of(net, data.take(by_id)))


@torch.no_grad()
def predict(net: StackedNet, x: NDArray[np.float32], batch: int = 512) -> Iterator[torch.Tensor]:
    """Yield logits (M, B, C) in evaluation mode, batch by batch."""
    net.eval()
    for start in range(0, len(x), batch):
        part = torch.from_numpy(x[start : start + batch])[:, None]
        yield net(part.expand(-1, net.models, *part.shape[2:]))
    net.train()


def accuracies(net: StackedNet, data: LabelledArrays) -> NDArray[np.float64]:
    """Accuracy of each model of the stack on the data, float64 (M,)."""
    guesses = torch.cat([logits.argmax(2) for logits in predict(net, data.x)], dim=1)
    right = (guesses == torch.from_numpy(data.y)).double().mean(1)
    return right.numpy()


def final_scores(
    net: StackedNet, data: LabelledArrays
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Entropy and loss of each row under the first model, in evaluation mode."""
    logits = torch.cat([part[0] for part in predict(net, data.x)])
    entropy, loss = final_statistics(logits, torch.from_numpy(data.y)).double().numpy()
    return entropy, loss


@torch.no_grad()
def features_of(net: StackedNet, data: LabelledArrays) -> NDArray[np.float32]:
    """Penultimate features of each row under a stack of one model, float32 (N, D)."""
    net.eval()
    x = torch.from_numpy(data.x)[:, None]
    parts = [net.features(x[start : start + 512])[0] for start in range(0, len(x), 512)]
    net.train()
    return torch.cat(parts).numpy()


def _optimizer(net: StackedNet, config: ProxyConfig) -> torch.optim.SGD:
    return torch.optim.SGD(
        net.parameters(),
        lr=config.lr,
        momentum=0.9,
        nesterov=True,
        weight_decay=config.weight_decay,
    )


def _step(
    optimizer: torch.optim.SGD, loss: torch.Tensor, step: int, steps: int, config: ProxyConfig
) -> None:
    for group in optimizer.param_groups:
        group["lr"] = cosine_lr(step, steps, config.lr, config.lr_end)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _stream(rows: IntArray, seed: int, batch: int) -> Iterator[IntArray]:
    """Endless batches of exactly ``batch`` rows from consecutive permutations."""
    rng = np.random.default_rng(seed)
    pending = np.zeros(0, np.int64)
    while True:
        while len(pending) < batch:
            pending = np.concatenate([pending, rng.permutation(rows)])
        yield pending[:batch]
        pending = pending[batch:]
