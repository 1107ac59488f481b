"""Reference twin of ``kernels/batched_mlp.py``: one autograd graph and torch.optim.SGD per client.

Slow and plain on purpose; the kernel is tested against it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional


def train(
    params: Sequence[Tensor],
    inputs_NI: Tensor,
    targets_N: Tensor,
    index_SCB: Tensor,
    scale_SCB: Tensor,
    active: Sequence[int],
    *,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    prox_mu: float = 0.0,
    drift: Sequence[Tensor] | None = None,
    regression: bool = False,
) -> tuple[Tensor, Tensor]:
    """Train C clients in place; arguments and result as in the kernel."""

    def forward(own: Sequence[Tensor], x: Tensor) -> Tensor:
        layers = len(own) // 2
        for layer in range(layers):
            x = functional.linear(x, own[2 * layer], own[2 * layer + 1])
            x = functional.relu(x) if layer + 1 < layers else x
        return x

    return train_each_client(
        forward, params, inputs_NI, targets_N, index_SCB, scale_SCB, active,
        lr=lr, momentum=momentum, weight_decay=weight_decay, prox_mu=prox_mu, drift=drift,
        regression=regression,
    )  # fmt: skip


def train_each_client(
    forward: Callable[[Sequence[Tensor], Tensor], Tensor],
    params: Sequence[Tensor],
    inputs: Tensor,
    targets_N: Tensor,
    index_SCB: Tensor,
    scale_SCB: Tensor,
    active: Sequence[int],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    prox_mu: float,
    drift: Sequence[Tensor] | None,
    regression: bool,
) -> tuple[Tensor, Tensor]:
    """Plain loop over clients and steps for any ``forward(params, inputs)``."""
    first = params[0].new_zeros(len(params[0]))
    last = torch.zeros_like(first)
    for client in range(len(first)):
        own = [part[client].clone().requires_grad_() for part in params]
        start = [part.detach().clone() for part in own]
        optimiser = torch.optim.SGD(own, lr=lr, momentum=momentum, weight_decay=weight_decay)
        for step, k in enumerate(active):
            if client >= k:
                break
            keep = scale_SCB[step, client] > 0
            index = index_SCB[step, client][keep]
            out = forward(own, inputs[index])
            if regression:
                loss = functional.mse_loss(out, targets_N[index])
            else:
                loss = functional.cross_entropy(out, targets_N[index])
            if step == 0:
                first[client] = loss.detach()
            last[client] = loss.detach()
            if prox_mu:
                distance = sum(((p - s) ** 2).sum() for p, s in zip(own, start))
                loss = loss + 0.5 * prox_mu * distance
            if drift is not None:
                loss = loss + sum((p * part[client]).sum() for p, part in zip(own, drift))
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        for part, trained in zip(params, own):
            part[client] = trained.detach()
    return first, last
