"""The losses of LTE (equations 4 to 6) and distillation.

Per token both are means over all layers and experts *together*: that is what lets layers
compete for the budget and end with different sparsity. Sums over tokens are returned, so that
any split of a batch over workers gives the same gradient once divided by the global count.
Scores are float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from raysys.training.lte.config import MIN_EPSILON, require

IGNORED = -100


def stack_scores(logits: Sequence[Tensor], valid: Tensor | None = None) -> list[Tensor]:
    """Scores in (0, 1) of valid tokens, float32 [tokens, experts], one per layer.

    Args:
        logits: z of each layer, [..., N].
        valid: bool mask over the leading axes; None counts every token.
    """
    flat = [z.float().flatten(0, -2) for z in logits]
    if valid is not None:
        flat = [z[valid.flatten()] for z in flat]
    return [torch.sigmoid(z) for z in flat]


def efficiency_sum(scores: Sequence[Tensor]) -> Tensor:
    """Sum over tokens of the mean squared score (equation 4)."""
    experts = sum(g.shape[-1] for g in scores)
    return torch.stack([g.square().sum() for g in scores]).sum() / experts


def separability_sum(scores: Sequence[Tensor], threshold: float, eps: float) -> Tensor:
    """Sum over tokens of the mean of ``1 / ((G - tau)^2 + eps)`` (equation 5).

    The paper prints no eps, and its loss is infinite at the threshold, where routers start.

    Raises:
        LTEConfigError: eps is below 1e-6.
    """
    require("eps", eps, eps >= MIN_EPSILON, f"at least {MIN_EPSILON}")
    experts = sum(g.shape[-1] for g in scores)
    terms = [((g - threshold).square() + eps).reciprocal().sum() for g in scores]
    return torch.stack(terms).sum() / experts


def separability_floor(threshold: float, eps: float) -> float:
    """Smallest value of the loss per token, where every score is at its far end."""
    return 1.0 / (max(threshold, 1.0 - threshold) ** 2 + eps)


def token_loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy in nats over labels that are not -100."""
    return functional.cross_entropy(
        logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def distillation_sum(
    student: Tensor, teacher: Tensor, valid: Tensor, temperature: float = 1.0
) -> Tensor:
    """Summed KL(teacher || student) over valid positions, times temperature squared."""
    mine = functional.log_softmax(student.float()[valid] / temperature, dim=-1)
    theirs = functional.log_softmax(teacher.float()[valid] / temperature, dim=-1)
    divergence = functional.kl_div(mine, theirs, reduction="sum", log_target=True)
    return divergence * temperature**2
