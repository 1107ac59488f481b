"""What one forward pass tells about each example: a few numbers per row, never the N x C soft-max.

Legend: B rows of a batch, C classes. Scores as in section 3 and appendix B of the CCS paper; the
released code keeps every soft-max vector of every step, we keep five numbers.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from raysys.errors import ConfigError

Margin = Literal["prob", "logit"]
# Cross-entropy of a probability that float32 cannot tell from zero: keeps the loss finite.
LOSS_CAP = 103.0


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class StatBatch:
    """Statistics of some visits, as sent from a training worker to the store.

    Args:
        epoch, rank, sequence: place in the order of application; unique together.
        ids: int64, shape (B,).
        labels: int64, shape (B,).
        margin: float32, p(true) - max p(other), or the same of logits.
        p_true: float32; probability of the label.
        el2n: float32; norm of p - one-hot.
        right: bool; whether the label has the highest logit.
    """

    epoch: int
    rank: int
    sequence: int
    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    margin: NDArray[np.float32]
    p_true: NDArray[np.float32]
    el2n: NDArray[np.float32]
    right: NDArray[np.bool_]

    @property
    def key(self) -> tuple[int, int, int]:
        return (self.epoch, self.rank, self.sequence)


@torch.no_grad()
def row_statistics(
    logits_BC: torch.Tensor, labels_B: torch.Tensor, margin: Margin = "prob"
) -> torch.Tensor:
    """Return float32 (4, B): margin, p_true, el2n and right, computed where the logits lie.

    The margin uses probabilities, as the paper's code does; ``"logit"`` is the original AUM
    (Pleiss et al., NeurIPS 2020).
    """
    logits = logits_BC.detach().float()
    index = labels_B.view(-1, 1)
    p = torch.softmax(logits, dim=1)
    p_true = p.gather(1, index).squeeze(1)
    # ||p - onehot||^2 = sum p^2 - 2 p_true + 1, without building the one-hot.
    el2n = ((p * p).sum(1) - 2 * p_true + 1).clamp_(min=0).sqrt_()
    if margin == "logit":
        true, other = logits.gather(1, index).squeeze(1), logits.scatter(1, index, -torch.inf)
    else:
        true, other = p_true, p.scatter_(1, index, -1.0)
    gap = true - other.amax(1)
    return torch.stack((gap, p_true, el2n, (gap > 0).float()))


@torch.no_grad()
def final_statistics(logits_BC: torch.Tensor, labels_B: torch.Tensor | None) -> torch.Tensor:
    """Return float32 (2, B): entropy and loss of the final model (loss is 0 without labels)."""
    log_p = torch.log_softmax(logits_BC.detach().float(), dim=1)
    entropy = torch.special.entr(log_p.exp()).sum(1)
    if labels_B is None:
        return torch.stack((entropy, torch.zeros_like(entropy)))
    loss = -log_p.gather(1, labels_B.view(-1, 1)).squeeze(1)
    return torch.stack((entropy, loss.clamp(max=LOSS_CAP)))


def check_batch(ids: Any, logits: torch.Tensor, labels: Any) -> None:
    """Check one call's shapes and kinds on the host, without looking at the values.

    Raises:
        ConfigError: labels absent, float, one-hot or multi-label, or lengths that differ.
    """
    if labels is None:
        remedy = "AUM, EL2N and forgetting need labels; entropy does not"
        raise ConfigError("labels", None, "class labels", remedy)
    if logits.ndim != 2 or logits.shape[1] < 2:
        remedy = "For regression or a single class use a loss-based score"
        raise ConfigError("logits", tuple(logits.shape), "shape (B, C) with C >= 2", remedy)
    if labels.ndim != 1 or labels.is_floating_point():
        remedy = "One class index per example; for multi-label data use the loss score"
        raise ConfigError("labels", (tuple(labels.shape), str(labels.dtype)), "int (B,)", remedy)
    if not len(ids) == len(labels) == len(logits):
        lengths = (len(ids), len(logits), len(labels))
        raise ConfigError("ids", lengths, "as many ids as logits and labels")
