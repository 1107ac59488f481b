"""Other routers trained with the model: noisy top-k softmax, fixed random, and sigma-MoE's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from raysys.training.lte.baselines.oracle import kept
from raysys.training.lte.gating import Gate, SparseModel, top_mask


class NoisyTopK:
    """Shazeer et al. (2017): softmax over the k largest noisy logits, noise learned.

    Scores are multiplied by k, so that the mean weight of a chosen expert is one, as in a dense
    FFN.
    """

    def __init__(self, sparsity: float, gate: Gate) -> None:
        self.sparsity = sparsity
        if not hasattr(gate.ffn.entry, "noise"):
            noise = nn.Linear(gate.ffn.hidden, gate.experts, bias=False)
            nn.init.zeros_(noise.weight)
            gate.ffn.entry.noise = noise

    def __call__(self, x: Tensor, z: Tensor, a: Tensor, gate: Gate) -> Tensor:
        if gate.ffn.entry.training:
            noise = gate.ffn.entry.noise
            assert isinstance(noise, nn.Module)
            z = z + torch.randn_like(z) * functional.softplus(noise(x).float())
        top = kept(gate.experts, self.sparsity)
        mask = top_mask(z, top)
        scores = torch.softmax(z.masked_fill(mask == 0, float("-inf")), dim=-1)
        return scores * top


class FixedTopK:
    """A router that never learns (random rows), hard top-k; the model adapts to it."""

    def __init__(self, sparsity: float) -> None:
        self.sparsity = sparsity

    def __call__(self, x: Tensor, z: Tensor, a: Tensor, gate: Gate) -> Tensor:
        return top_mask(z.detach(), kept(gate.experts, self.sparsity))


class SigmaTopK:
    """Sigma-MoE (Csordas et al. 2023): sigmoid scores, top-k, scores scale the outputs."""

    def __init__(self, sparsity: float) -> None:
        self.sparsity = sparsity

    def __call__(self, x: Tensor, z: Tensor, a: Tensor, gate: Gate) -> Tensor:
        scores = torch.sigmoid(z)
        return scores * top_mask(scores.detach(), kept(gate.experts, self.sparsity))


def noisy_top_k(sparse: SparseModel, sparsity: float) -> list[NoisyTopK]:
    """One selector per layer."""
    return [NoisyTopK(sparsity, gate) for gate in sparse.gates]
