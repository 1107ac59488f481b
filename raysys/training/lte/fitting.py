"""Routers that start from what the dense model does (ours): no training, only least squares.

For sample text, every expert's share of its FFN's output is measured, and the router is the ridge
regression from the FFN's input to its logarithm. One threshold over all layers gives the wanted
sparsity, so layers differ. It is a start for short trainings, and gives real routing for speed
measurements; quality still has to be trained.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raysys.training.lte.config import require
from raysys.training.lte.errors import LTEDataError
from raysys.training.lte.gating import Gate, SparseModel
from raysys.training.lte.text import Batch

FLOOR = 1e-4  # of an expert's share, before the logarithm


class _Collect:
    """A selector that switches nothing off and keeps what a layer saw."""

    def __init__(self) -> None:
        self.x: list[Tensor] = []
        self.share: list[Tensor] = []

    def __call__(self, x: Tensor, z: Tensor, a: Tensor, gate: Gate) -> None:
        self.x.append(x.detach().float().flatten(0, -2))
        self.share.append(expert_shares(a, gate))


def expert_shares(a: Tensor, gate: Gate) -> Tensor:
    """Each expert's share of the output's size, [tokens, N], mean 1 over the experts.

    The size is the sum of |activation| times the norm of what the neuron writes.
    """
    norms = gate.ffn.columns().detach().float().norm(dim=1)
    size = (a.detach().float().abs() * norms).flatten(0, -2)
    energy = size.reshape(len(size), gate.experts, gate.expert_size).sum(-1)
    shares: Tensor = energy * (gate.experts / energy.sum(-1, keepdim=True).clamp_min(1e-12))
    return shares


@torch.no_grad()
def fit_routers(
    sparse: SparseModel, batches: Sequence[Batch], sparsity: float, ridge: float = 1e-2
) -> None:
    """Fit every router to sample batches; the model needs routers with a bias.

    Args:
        sparse: converted with ``router_init="warm"``.
        batches: sample text; some thousand tokens.
        sparsity: share of (token, expert) pairs to switch off, in [0, 1).
        ridge: strength of the regularisation, relative to the inputs' variance.

    Raises:
        LTEConfigError: the sparsity is not in [0, 1), or the routers have no bias.
        LTEDataError: there is no text.
    """
    require("sparsity", sparsity, 0.0 <= sparsity < 1.0, "a number in [0, 1)")
    biased = all(router.bias is not None for router in sparse.routers)
    require("router_init", "default", biased, "'warm': fitted routers need a bias")
    if not batches:
        raise LTEDataError("batches", "are empty", "Give sample text")
    collected = [_Collect() for _ in sparse.gates]
    sparse.set_selectors(collected)
    for batch in batches:
        sparse.model(**batch.inputs)
    sparse.set_mode("dense")
    predictions = []
    for router, kept in zip(sparse.routers, collected):
        predictions.append(_fit(router, torch.cat(kept.x), torch.cat(kept.share), ridge))
    every = torch.cat([p.flatten() for p in predictions])
    cut = every.kthvalue(max(1, min(every.numel(), round(sparsity * every.numel())))).values
    for router in sparse.routers:
        assert router.bias is not None
        router.bias.sub_(cut if sparsity > 0 else every.min() - 1.0)


def _fit(router: torch.nn.Module, x: Tensor, share: Tensor, ridge: float) -> Tensor:
    """Least squares into a router; returns its predictions."""
    target = share.clamp_min(FLOOR).log().double()
    mean_x, mean_y = x.mean(0), target.mean(0)
    centred = (x - mean_x).double()
    gram = centred.T @ centred
    gram.diagonal().add_(ridge * gram.diagonal().mean() + 1e-9)
    weight = torch.linalg.solve(gram, centred.T @ (target - mean_y)).T.float()
    router.weight.copy_(weight)  # type: ignore[operator]
    router.bias.copy_(mean_y.float() - weight @ mean_x)  # type: ignore[operator]
    predicted: Tensor = router(x)
    return predicted


@torch.no_grad()
def land(sparse: SparseModel, batches: Sequence[Batch], sparsity: float) -> float:
    """Shift the thresholds of all layers by one offset, so that sample text has the wanted
    sparsity.

    Called between the stages: the controller comes close, stage 2 adapts to the rest. The
    offset goes into the routers' biases where they have one, else into the gates' thresholds.

    Returns:
        The offset in logits by which scores fell.
    """
    require("sparsity", sparsity, 0.0 <= sparsity < 1.0, "a number in [0, 1)")
    sparse.model.eval()
    sparse.set_mode("hard")
    with sparse.recording() as records:
        for batch in batches:
            sparse.model(**batch.inputs)
    scores = [z.flatten() - gate.threshold for gate, r in zip(sparse.gates, records) for z, _ in r]
    every = torch.cat(scores)
    place = max(1, min(every.numel(), round(sparsity * every.numel())))
    offset = float(every.kthvalue(place).values)
    for gate in sparse.gates:
        if gate.router.bias is not None:
            gate.router.bias.sub_(offset)
        else:
            gate.threshold += offset
    return offset
