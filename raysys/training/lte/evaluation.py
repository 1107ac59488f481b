"""Quality and sparsity of a model on held-out batches; sums and counts only, so parts add
exactly.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from raysys.training.lte.errors import LTEDataError
from raysys.training.lte.gating import Mode, SparseModel, SparsityCount
from raysys.training.lte.losses import IGNORED, token_loss_sum
from raysys.training.lte.stage import shift
from raysys.training.lte.text import Batch


@dataclasses.dataclass(slots=True, eq=False)
class Evaluation:
    """Sums over what was evaluated.

    Args:
        loss_sum, count, correct: of the labels that count.
        sparsity: active experts per layer.
        by_position: active experts and possible ones by token position, float64 [2, S].
    """

    loss_sum: float
    count: int
    correct: int
    sparsity: SparsityCount
    by_position: torch.Tensor

    @property
    def nll(self) -> float:
        """Nats per label."""
        return self.loss_sum / self.count

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready figures."""
        density = self.by_position[0] / self.by_position[1].clamp_min(1)
        return {
            "nll": self.nll,
            "perplexity": math.exp(min(self.nll, 700.0)),
            "accuracy": self.correct / self.count,
            "labels": self.count,
            "sparsity": self.sparsity.overall,
            "sparsity_per_layer": self.sparsity.per_layer,
            "density_by_position": density.tolist(),
        }


@torch.no_grad()
def evaluate(
    sparse: SparseModel,
    batches: Iterable[Batch],
    *,
    mode: Mode | None = "hard",
    offset: float = 0.0,
) -> Evaluation:
    """Evaluate under a selection; ``mode=None`` keeps the selectors that are set.

    Raises:
        LTEDataError: there is no label to evaluate on.
    """
    sparse.model.eval()
    if mode is not None:
        sparse.set_mode(mode, offset=offset)
    count = SparsityCount.empty(len(sparse.gates))
    position = torch.zeros(2, 0, dtype=torch.float64)
    loss_sum, labels_seen, correct = 0.0, 0, 0
    for batch in batches:
        with sparse.recording() as records:
            output = sparse.model(**batch.inputs).logits
        logits, labels = shift(output, batch.labels)
        counts = labels != IGNORED
        loss_sum += float(token_loss_sum(logits, labels))
        labels_seen += int(counts.sum())
        correct += int(((logits.argmax(-1) == labels) & counts).sum())
        for layer, record in enumerate(records):
            for _, weights in record:
                count.add(layer, weights, batch.valid)
        position = _add_positions(position, records)
    if labels_seen == 0:
        raise LTEDataError("evaluation", "has no labels", "Give more text")
    return Evaluation(loss_sum, labels_seen, correct, count, position)


def _add_positions(total: torch.Tensor, records: Sequence[Sequence[Any]]) -> torch.Tensor:
    """Add active and possible experts by position; only for weights of shape [B, S, N]."""
    for record in records:
        for _, weights in record:
            if weights.ndim != 3:
                continue
            length = weights.shape[1]
            if total.shape[1] < length:
                total = torch.nn.functional.pad(total, (0, length - total.shape[1]))
            total[0, :length] += (weights != 0).sum((0, 2), dtype=torch.float64).cpu()
            total[1, :length] += weights.shape[0] * weights.shape[2]
    return total
