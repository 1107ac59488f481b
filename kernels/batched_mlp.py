"""Local SGD of many clients on one multilayer perceptron, as batched matrix products.

Every client has its own copy of the parameters, stacked along a leading axis C; the gradients are
written out by hand, so that one step of C clients is a handful of batched products instead of C
graphs. A linear model is an MLP without hidden layers. Needs torch only; the reference twin is
``raysys.ops.batched_mlp``.

Dimensions: C clients in the chunk, B samples in a batch, S steps, N samples in the data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


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
    before_step: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Train C clients in place; clients are sorted by falling number of steps.

    Args:
        params: weight [C, out, in] and bias [C, out] of each layer in turn, float32, contiguous;
            overwritten by the trained parameters. ReLU between the layers.
        inputs_NI: float32 samples. targets_N: int64 labels, or float32 [N, out] for regression.
        index_SCB: int64 sample numbers of each step, client and place in the batch.
        scale_SCB: float32 weight of each place: 1 / batch size, or 0 where the batch is shorter.
        active: number of clients that still train in each step; never rises.
        lr, momentum, weight_decay, prox_mu: as ``torch.optim.SGD`` plus the proximal term
            ``prox_mu * (w - w0)`` of FedProx.
        drift: added to the gradient at each step, shaped like ``params`` (SCAFFOLD's c - c_k).
        regression: squared error averaged over outputs instead of cross-entropy.
        before_step: called with the number of each step before it; may read ``params``.

    Returns:
        Mean loss of each client's first and last batch, float32 [C] each.
    """
    start = [p.clone() for p in params] if prox_mu else None
    velocity = [torch.zeros_like(p) for p in params] if momentum or drift is not None else None
    losses_first = params[0].new_zeros(params[0].shape[0])
    losses_last = torch.zeros_like(losses_first)
    for step, k in enumerate(active):
        if before_step is not None:
            before_step(step)
        live = [p[:k] for p in params]
        scale_kB = scale_SCB[step, :k]
        index = index_SCB[step, :k].reshape(-1)
        x_kBI = inputs_NI.index_select(0, index).view(k, -1, inputs_NI.shape[1])
        y = targets_N.index_select(0, index).view(k, scale_kB.shape[1], *targets_N.shape[1:])
        acts = _forward(live, x_kBI)
        finishing = active[step + 1] if step + 1 < len(active) else 0
        error, first, last = _output_error(acts[-1], y, scale_kB, step == 0, finishing, regression)
        if first is not None:
            losses_first[:k] = first
        if last is not None:
            losses_last[finishing:k] = last
        grads = _backward(live, acts, error)
        _update(live, grads, k, lr, momentum, weight_decay, prox_mu, start, velocity, drift)
    return losses_first, losses_last


def _forward(params: Sequence[Tensor], x_kBI: Tensor) -> list[Tensor]:
    """Return the input of every layer and, last, the outputs of the network."""
    acts = [x_kBI]
    layers = len(params) // 2
    for layer in range(layers):
        weight, bias = params[2 * layer], params[2 * layer + 1]
        out = torch.baddbmm(bias.unsqueeze(1), acts[-1], weight.transpose(1, 2))
        acts.append(out.relu_() if layer + 1 < layers else out)
    return acts


def _output_error(
    out_kBO: Tensor,
    targets: Tensor,
    scale_kB: Tensor,
    want_first: bool,
    finishing: int,
    regression: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradient of the mean loss by the outputs; losses of all and of the finishing clients."""
    k = out_kBO.shape[0]
    per_sample = None
    if regression:
        error = out_kBO - targets
        per_sample = error.square().mean(-1) if want_first or finishing < k else None
        error = error.mul_(scale_kB.unsqueeze(-1) * (2.0 / error.shape[-1]))
    else:
        # Written out: torch.softmax takes four times as long over a short last dimension.
        label = targets.unsqueeze(-1)
        top = out_kBO.amax(-1, keepdim=True)
        error = torch.exp(out_kBO - top)
        total = error.sum(-1, keepdim=True)
        if want_first or finishing < k:
            per_sample = (total.log() + top - out_kBO.gather(-1, label)).squeeze(-1)
        scale = scale_kB.unsqueeze(-1)
        error.mul_(scale / total).scatter_add_(-1, label, -scale)
    if per_sample is None:
        return error, None, None
    losses = (per_sample * scale_kB).sum(1)
    return error, losses if want_first else None, losses[finishing:] if finishing < k else None


def _backward(
    params: Sequence[Tensor], acts: Sequence[Tensor], error: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Return (error at the layer's output, input of the layer) for each layer, last layer first."""
    pairs = []
    for layer in range(len(params) // 2 - 1, -1, -1):
        pairs.append((error, acts[layer]))
        if layer:
            passed = torch.bmm(error, params[2 * layer])
            error = torch.ops.aten.threshold_backward(passed, acts[layer], 0)  # ReLU's gradient
    return pairs


def _update(
    live: Sequence[Tensor],
    grads: Sequence[tuple[Tensor, Tensor]],
    k: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    prox_mu: float,
    start: Sequence[Tensor] | None,
    velocity: Sequence[Tensor] | None,
    drift: Sequence[Tensor] | None,
) -> None:
    """One SGD step; the products of the gradients are added straight into their destination."""
    decay = weight_decay + prox_mu
    for number, (error, inputs) in enumerate(reversed(grads)):
        for place in (2 * number, 2 * number + 1):
            weight = live[place]
            if velocity is None:
                if decay:
                    weight.mul_(1.0 - lr * decay)
                if start is not None:
                    weight.add_(start[place][:k], alpha=lr * prox_mu)
                _add_product(weight, error, inputs, -lr)
                continue
            speed = velocity[place][:k]
            speed.mul_(momentum)
            _add_product(speed, error, inputs, 1.0)
            if decay:
                speed.add_(weight, alpha=decay)
            if start is not None:
                speed.add_(start[place][:k], alpha=-prox_mu)
            if drift is not None:
                speed.add_(drift[place][:k])
            weight.add_(speed, alpha=-lr)


def _add_product(target: Tensor, error_kBO: Tensor, inputs_kBI: Tensor, alpha: float) -> None:
    """Add alpha times the layer's gradient to a stacked weight [k, out, in] or bias [k, out]."""
    if target.dim() == 3:
        target.baddbmm_(error_kBO.transpose(1, 2), inputs_kBI, alpha=alpha)
    else:
        target.add_(error_kBO.sum(1), alpha=alpha)
