"""Local SGD of many clients on a bag-of-embeddings classifier, as batched products.

The model is mean(embedding[tokens]) followed by a linear layer. Each client has its own stacked
copy; the gradient of the embedding is written only into the rows that the batch touched, which is
what makes this faster than a map over clients with dense gradients. Needs torch only; the
reference twin is ``raysys.ops.batched_embedding_bag``.

Dimensions: C clients, B samples in a batch, L tokens of a sample, V vocabulary, D embedding, O
outputs, S steps, N samples in the data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def train(
    params: Sequence[Tensor],
    tokens_NL: Tensor,
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
    before_step: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Train C clients in place; clients are sorted by falling number of steps.

    Args:
        params: embedding [C, V, D], weight [C, O, D] and bias [C, O], float32, contiguous;
            overwritten by the trained parameters.
        tokens_NL: int64 tokens of every sample. targets_N: int64 labels, or float32 [N, O].
        index_SCB, scale_SCB, active: batches, as in ``batched_mlp``.
        lr, momentum, weight_decay, prox_mu, drift, regression, before_step: as in
            ``batched_mlp``.

    Returns:
        Mean loss of each client's first and last batch, float32 [C] each.
    """
    table, weight, bias = params
    clients, vocabulary, dim = table.shape
    start = [p.clone() for p in params] if prox_mu else None
    velocity = [torch.zeros_like(p) for p in params] if momentum or drift is not None else None
    first = table.new_zeros(clients)
    last = torch.zeros_like(first)
    row_of_client = (torch.arange(clients) * vocabulary).view(-1, 1, 1)
    for step, k in enumerate(active):
        if before_step is not None:
            before_step(step)
        index, scale_kB = index_SCB[step, :k], scale_SCB[step, :k]
        tokens_kBL = tokens_NL[index] + row_of_client[:k]
        flat = table.view(-1, dim)
        bag_kBD = flat[tokens_kBL].mean(dim=2)
        out_kBO = torch.baddbmm(bias[:k].unsqueeze(1), bag_kBD, weight[:k].transpose(1, 2))
        error_kBO, losses = _output_error(out_kBO, targets_N[index], scale_kB, regression)
        if step == 0:
            first.copy_(losses)
        last[:k] = losses
        error_bag = torch.bmm(error_kBO, weight[:k]).div_(tokens_NL.shape[1])
        spread = error_bag.unsqueeze(2).expand(-1, -1, tokens_NL.shape[1], -1).reshape(-1, dim)
        for place, param in enumerate(params):
            live = param[:k]
            target, alpha = (live, -lr) if velocity is None else (velocity[place][:k], 1.0)
            origin = None if start is None else start[place][:k]
            if velocity is None:
                _decay(live, origin, lr, weight_decay, prox_mu)
            else:
                extra = None if drift is None else drift[place][:k]
                _gather_speed(target, live, origin, extra, momentum, weight_decay, prox_mu)
            if place == 0:
                target.view(-1, dim).index_add_(0, tokens_kBL.reshape(-1), spread, alpha=alpha)
            elif place == 1:
                target.baddbmm_(error_kBO.transpose(1, 2), bag_kBD, alpha=alpha)
            else:
                target.add_(error_kBO.sum(1), alpha=alpha)
            if velocity is not None:
                live.add_(target, alpha=-lr)
    return first, last


def _decay(
    live: Tensor, origin: Tensor | None, lr: float, weight_decay: float, prox_mu: float
) -> None:
    """Apply weight decay and the proximal pull to the parameters themselves."""
    if weight_decay or prox_mu:
        live.mul_(1.0 - lr * (weight_decay + prox_mu))
    if origin is not None:
        live.add_(origin, alpha=lr * prox_mu)


def _gather_speed(
    speed: Tensor,
    live: Tensor,
    origin: Tensor | None,
    drift: Tensor | None,
    momentum: float,
    weight_decay: float,
    prox_mu: float,
) -> None:
    """Start a step's velocity: all but the gradient of the loss."""
    speed.mul_(momentum).add_(live, alpha=weight_decay + prox_mu)
    if origin is not None:
        speed.add_(origin, alpha=-prox_mu)
    if drift is not None:
        speed.add_(drift)


def _output_error(
    out_kBO: Tensor, targets: Tensor, scale_kB: Tensor, regression: bool
) -> tuple[Tensor, Tensor]:
    """Gradient of the mean loss by the outputs [k, B, O], and each client's mean loss [k]."""
    if regression:
        error = out_kBO - targets
        losses = (error.square().mean(-1) * scale_kB).sum(1)
        return error.mul_(scale_kB.unsqueeze(-1) * (2.0 / error.shape[-1])), losses
    label = targets.unsqueeze(-1)
    log_p = torch.log_softmax(out_kBO, -1)
    losses = -(log_p.gather(-1, label).squeeze(-1) * scale_kB).sum(1)
    error = log_p.exp_()
    error.scatter_add_(-1, label, -torch.ones_like(label, dtype=error.dtype))
    return error.mul_(scale_kB.unsqueeze(-1)), losses
