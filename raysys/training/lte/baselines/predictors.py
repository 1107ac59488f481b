"""Predictors trained afterwards: MoEfication's per expert and Deja Vu's per neuron.

Zhang et al., "MoEfication", ACL Findings 2022; Liu et al., "Deja Vu", ICML 2023. Both see the
FFN's input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from raysys.training.lte.baselines.oracle import expert_sums, kept
from raysys.training.lte.gating import Gate, Selector, SparseModel, top_mask
from raysys.training.lte.text import Batch

BATCH = 512
HELD_OUT = 0.1  # of the sample, to keep the best epoch


class _Sample:
    """Inputs and activations of one layer."""

    def __init__(self) -> None:
        self.x: list[Tensor] = []
        self.a: list[Tensor] = []

    def __call__(self, x: Tensor, z: Tensor, a: Tensor, gate: Gate) -> None:
        self.x.append(x.detach().float().flatten(0, -2))
        self.a.append(a.detach().float().flatten(0, -2))


class Predicted:
    """Top-k of a predictor's scores, per expert or per neuron."""

    def __init__(self, network: nn.Module, sparsity: float) -> None:
        self.network, self.sparsity = network, sparsity

    def __call__(self, x: Tensor, z: Tensor, a: Tensor, gate: Gate) -> Tensor:
        scores = self.network(x.detach().float())
        return top_mask(scores, kept(scores.shape[-1], self.sparsity))


def moefication(
    sparse: SparseModel, batches: Sequence[Batch], sparsity: float, epochs: int = 30, seed: int = 0
) -> list[Selector]:
    """A d -> n -> n network per layer, tanh between, BCE against scaled expert scores.

    The first layer starts as the clusters' centres, the second as the identity; Adam at 0.01; the
    epoch that captures most of the experts' scores is kept.
    """
    found: list[Selector] = []
    for gate, sample in zip(sparse.gates, _collect(sparse, batches)):
        x, scores = torch.cat(sample.x), expert_sums(torch.cat(sample.a), gate)
        network = _moefication_network(gate)
        target = scores / scores.amax(-1, keepdim=True).clamp_min(1e-12)
        _train(network, x, target, scores, kept(gate.experts, sparsity), epochs, 0.01, None, seed)
        found.append(Predicted(network, sparsity))
    return found


def deja_vu(
    sparse: SparseModel, batches: Sequence[Batch], sparsity: float, epochs: int = 10, seed: int = 0
) -> list[Selector]:
    """A bottleneck network per layer, recall-weighted BCE against "among the k largest |a|"."""
    found: list[Selector] = []
    for gate, sample in zip(sparse.gates, _collect(sparse, batches)):
        x, size = torch.cat(sample.x), torch.cat(sample.a).abs()
        width = predictor_width(gate.ffn.hidden)
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Linear(gate.ffn.hidden, width, bias=False),
            nn.ReLU(),
            nn.Linear(width, size.shape[1]),
        )
        top = kept(size.shape[1], sparsity)
        target = top_mask(size, top)
        weight = (size.shape[1] - top) / top  # a missed neuron costs more than a superfluous one
        _train(network, x, target, size, top, epochs, 1e-3, weight, seed)
        found.append(Predicted(network, sparsity))
    return found


def predictor_width(hidden: int) -> int:
    """Width of Deja Vu's bottleneck."""
    return max(16, hidden // 4)


@torch.no_grad()
def _collect(sparse: SparseModel, batches: Sequence[Batch]) -> list[_Sample]:
    samples = [_Sample() for _ in sparse.gates]
    sparse.set_selectors(samples)
    sparse.model.eval()
    for batch in batches:
        sparse.model(**batch.inputs)
    sparse.set_mode("dense")
    return samples


def _moefication_network(gate: Gate) -> nn.Module:
    experts, hidden = gate.experts, gate.ffn.hidden
    first, second = nn.Linear(hidden, experts, bias=False), nn.Linear(experts, experts, bias=False)
    with torch.no_grad():
        rows = gate.ffn.rows(0).float().reshape(experts, gate.expert_size, hidden)
        first.weight.copy_(functional.normalize(rows, dim=-1).mean(1))
        second.weight.copy_(torch.eye(experts))
    return nn.Sequential(first, nn.Tanh(), second)


def _train(
    network: nn.Module, x: Tensor, target: Tensor, scores: Tensor, top: int, epochs: int, lr: float,
    weight: float | None, seed: int,
) -> None:  # fmt: skip
    """Fit; afterwards the network has the weights of the epoch that captured most of ``scores``."""
    generator = torch.Generator().manual_seed(seed)
    cut = max(1, math.floor(len(x) * (1 - HELD_OUT)))
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    positive = None if weight is None else torch.tensor(weight)
    best, state = -1.0, {k: v.clone() for k, v in network.state_dict().items()}
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(cut, generator=generator), BATCH):
            logits = network(x[rows])
            loss = functional.binary_cross_entropy_with_logits(
                logits, target[rows], pos_weight=positive
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            chosen = top_mask(network(x[cut:]), top)
            ratio = float((scores[cut:] * chosen).sum() / scores[cut:].topk(top, -1).values.sum())
        if ratio > best:
            best, state = ratio, {k: v.clone() for k, v in network.state_dict().items()}
    network.load_state_dict(state)
