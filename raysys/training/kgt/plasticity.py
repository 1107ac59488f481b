"""Plasticity: how differently the training and the reference model see a mini-batch.

The similarity-preserving loss (Tung & Mori, ICCV 2019) between Gram matrices, as the paper uses it
(section 4.2). We ship row-normalised Gram matrices, b x b floats, instead of activations, and take
a fixed sub-sample of rows.

Dimensions: B rows of the sub-sample, D flattened features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TINY = 1e-12


def subsample(rows: int, limit: int) -> slice:
    """The fixed rule which rows of a batch are compared: the first ``limit``."""
    return slice(0, min(rows, limit))


def gram(activations: Tensor) -> Tensor:
    """Row-normalised Gram matrix, float32 (B, B), of activations (B, ...).

    Zero rows stay zero (1e-12 is added under the root). Integer input is converted.
    """
    flat_BD = activations.detach().reshape(activations.shape[0], -1).to(torch.float32)
    gram_BB = flat_BD @ flat_BD.T
    norm_B1 = (gram_BB.square().sum(1, keepdim=True) + _TINY).sqrt()
    return gram_BB / norm_B1


def sp_loss(train_BB: Tensor, reference_BB: Tensor) -> float | None:
    """Similarity-preserving loss of two normalised Gram matrices: mean squared difference.

    Returns:
        ``(1 / B^2) * ||G_train - G_reference||_F^2``, or None where there is nothing to compare:
        a batch of one row (its Gram matrix is constant), other shapes, NaN or infinity.
    """
    if train_BB.shape != reference_BB.shape or train_BB.shape[0] < 2:
        return None
    value = float((train_BB - reference_BB).square().mean())
    return value if math.isfinite(value) else None


def gram_error(candidate_BB: Tensor, exact_BB: Tensor) -> float:
    """Relative Frobenius error of a Gram matrix; infinity if it is not finite."""
    error = float((candidate_BB - exact_BB).norm() / (exact_BB.norm() + _TINY))
    return error if math.isfinite(error) else math.inf
