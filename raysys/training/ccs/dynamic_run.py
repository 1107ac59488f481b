"""Training with InfoBatch: fewer steps on the same data, where a coreset stores less data."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional

from raysys.training.ccs.baselines.dynamic import InfoBatch
from raysys.training.ccs.proxy import ProxyConfig, StackedNet, cosine_lr
from raysys.training.datasets import LabelledArrays


def train_infobatch(
    data: LabelledArrays,
    config: ProxyConfig,
    *,
    ratio: float = 0.5,
    delta: float = 0.875,
    seed: int = 0,
) -> tuple[StackedNet, int]:
    """Train for the epochs that ``config.iterations`` full steps make, dropping as it goes.

    The cosine rate follows the share of epochs done, since the number of steps is not known before.

    Returns:
        The network (a stack of one) and the steps that it took.
    """
    net = StackedNet(data.x.shape[1:], data.classes, config.channels, [seed])
    optimizer = torch.optim.SGD(
        net.parameters(),
        lr=config.lr,
        momentum=0.9,
        nesterov=True,
        weight_decay=config.weight_decay,
    )
    per_epoch = math.ceil(len(data) / config.batch)
    epochs = max(1, round(config.iterations / per_epoch))
    pruner = InfoBatch(len(data), epochs, ratio=ratio, delta=delta, seed=seed)
    x, y = torch.from_numpy(data.x), torch.from_numpy(data.y)
    steps = 0
    for epoch in range(epochs):
        rows, weights = pruner.epoch(epoch)
        parts = np.array_split(np.arange(len(rows)), math.ceil(len(rows) / config.batch))
        for place, part in enumerate(parts):
            chosen = torch.from_numpy(rows[part])
            losses = functional.cross_entropy(
                net(x[chosen][:, None])[0], y[chosen], reduction="none"
            )
            pruner.update(rows[part], losses.detach().double().numpy())
            weight = torch.from_numpy(weights[part]).float()
            done = (epoch + place / len(parts)) * 1000
            for group in optimizer.param_groups:
                group["lr"] = cosine_lr(int(done), epochs * 1000, config.lr, config.lr_end)
            optimizer.zero_grad()
            (losses * weight).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            steps += 1
    return net, steps
