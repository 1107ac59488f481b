"""Selections from the true activations: upper references that save no work."""

from __future__ import annotations

import torch
from torch import Tensor

from raysys.training.lte.fitting import expert_shares
from raysys.training.lte.gating import Gate, top_mask


def kept(total: int, sparsity: float) -> int:
    """How many of ``total`` stay at a sparsity; at least one."""
    return max(1, round((1.0 - sparsity) * total))


class KeepLargest:
    """KLA: the largest |activations| of every token, neuron by neuron."""

    def __init__(self, sparsity: float) -> None:
        self.sparsity = sparsity

    def __call__(self, x: Tensor, z: Tensor, a: Tensor, gate: Gate) -> Tensor:
        return top_mask(a.detach().abs().float(), kept(a.shape[-1], self.sparsity))


class TopExperts:
    """The experts with the largest sum of |activations| (MoEfication's ground truth).

    Args:
        sparsity: share of the experts that is off.
        weighted: weigh each activation by what its neuron writes (ours; off is the paper's).
    """

    def __init__(self, sparsity: float, *, weighted: bool = False) -> None:
        self.sparsity, self.weighted = sparsity, weighted

    def __call__(self, x: Tensor, z: Tensor, a: Tensor, gate: Gate) -> Tensor:
        scores = expert_shares(a, gate) if self.weighted else expert_sums(a, gate)
        scores = scores.reshape(*a.shape[:-1], gate.experts)
        return top_mask(scores, kept(gate.experts, self.sparsity))


def expert_sums(a: Tensor, gate: Gate) -> Tensor:
    """Sum of |activations| per expert, [..., N]."""
    size = a.detach().abs().float()
    sums: Tensor = size.reshape(*a.shape[:-1], gate.experts, gate.expert_size).sum(-1)
    return sums


class NeuronThreshold:
    """CATS: a neuron is off where |act(gate)| is below its layer's threshold.

    Lee et al., "CATS: Contextually-Aware Thresholding for Sparsity", COLM 2024. The threshold
    is the wanted quantile over the first batch that is seen (the calibration sample).
    """

    def __init__(self, sparsity: float) -> None:
        self.sparsity = sparsity
        self.threshold: float | None = None

    def __call__(self, x: Tensor, z: Tensor, a: Tensor, gate: Gate) -> Tensor:
        pre = torch.nn.functional.linear(x, gate.ffn.rows(0))
        size = torch.nn.functional.silu(pre).abs() if gate.ffn.gated else a.abs()
        if self.threshold is None:
            flat = size.detach().float().flatten()
            place = max(1, round(self.sparsity * flat.numel()))
            self.threshold = float(flat.kthvalue(place).values)
        return (size > self.threshold).float()
