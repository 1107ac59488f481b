"""Progressive validation: predict every batch, then train on it (McMahan et al. 2013)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from raysys.training.fiited.baselines import Embedding, to_tensor
from raysys.training.fiited.stream import ClickBatch

F32 = npt.NDArray[np.float32]


@dataclass(slots=True)
class Record:
    """Predictions, labels and true probabilities in stream order, step by step."""

    scores: list[F32] = field(default_factory=list)
    labels: list[F32] = field(default_factory=list)
    truth: list[F32] = field(default_factory=list)

    def auc(self, start: float = 0.0, end: float = 1.0) -> float:
        """AUC over a part of the stream, given as fractions of its steps."""
        return self._auc(self.scores, start, end)

    def bayes_auc(self, start: float = 0.0, end: float = 1.0) -> float:
        """AUC of the true probabilities over a part of the stream."""
        return self._auc(self.truth, start, end)

    def log_loss(self, start: float = 0.0, end: float = 1.0) -> float:
        """Mean log-loss in nats."""
        low, high = self._steps(start, end)
        p = _clip(np.concatenate(self.scores[low:high]))
        y = np.concatenate(self.labels[low:high])
        return float(-np.mean(y * np.log(p) + (1 - y) * np.log(1 - p)))

    def normalised_entropy(self, start: float = 0.0, end: float = 1.0) -> float:
        """Log-loss over the entropy of the base rate (He et al. 2014)."""
        low, high = self._steps(start, end)
        base = float(np.clip(np.mean(np.concatenate(self.labels[low:high])), 1e-7, 1 - 1e-7))
        entropy = -(base * np.log(base) + (1 - base) * np.log(1 - base))
        return self.log_loss(start, end) / float(entropy)

    def _auc(self, values: list[F32], start: float, end: float) -> float:
        low, high = self._steps(start, end)
        labels = np.concatenate(self.labels[low:high])
        if labels.min() == labels.max():
            return 0.5
        return float(roc_auc_score(labels, np.concatenate(values[low:high])))

    def _steps(self, start: float, end: float) -> tuple[int, int]:
        n = len(self.scores)
        low = min(int(n * start), n - 1)
        return low, max(low + 1, int(n * end))


def run(
    batches: Iterable[ClickBatch],
    embedding: Embedding,
    model: nn.Module,
    *,
    lr: float = 0.005,
) -> Record:
    """Predict-then-train over a stream; the dense net trains with Adam on the mean log-loss."""
    record = Record()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    criterion = nn.BCEWithLogitsLoss()
    for batch in batches:
        logits = model(embedding(to_tensor(batch.ids)))
        record.scores.append(torch.sigmoid(logits.detach()).numpy())
        record.labels.append(batch.labels)
        record.truth.append(batch.truth)
        loss = criterion(logits, torch.from_numpy(batch.labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        embedding.end_step()
    return record


def _clip(p: F32) -> npt.NDArray[np.float64]:
    return np.clip(p.astype(np.float64), 1e-7, 1 - 1e-7)
