"""Streaming training: predict, then train, window by window; drift, ramp and guard on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from raysys.training.fiited.bag import FiitedEmbeddingBag
from raysys.training.fiited.budget import Decision, DriftDetector, Guard, Ramp
from raysys.training.fiited.clicks import Clicks

F32 = npt.NDArray[np.float32]
GUARD_SHARE = 0.01  # of a window's samples are scored twice, at least
GUARD_MIN = 256
MARGIN = 1.25  # chunks with up to this multiple of the threshold count as marginal


class Window:
    """Predictions and labels of one window of the stream, made before training on them."""

    def __init__(self) -> None:
        self.scores: list[F32] = []
        self.labels: list[F32] = []

    def add(self, scores: F32, labels: F32) -> None:
        self.scores.append(scores)
        self.labels.append(labels)

    def summary(self) -> dict[str, float]:
        """AUC, log-loss, normalised entropy and base rate; AUC 0.5 where one class is absent."""
        p = np.clip(np.concatenate(self.scores).astype(np.float64), 1e-7, 1 - 1e-7)
        y = np.concatenate(self.labels)
        rate = float(np.clip(y.mean(), 1e-7, 1 - 1e-7))
        loss = log_loss(p, y)
        entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
        auc = float(roc_auc_score(y, p)) if 0 < y.sum() < len(y) else 0.5
        return {
            "auc": auc, "log_loss": loss, "normalised_entropy": loss / float(entropy),
            "base_rate": float(y.mean()), "samples": float(len(y)),
        }  # fmt: skip


class StreamTrainer:
    """One model over one embedding layer.

    Args:
        embedding: :class:`FiitedEmbeddingBag` or a sharded one; ids [B, F] to [B, F * D].
        model: dense net (embeddings, dense features) -> logits [B].
        lr: of the dense net's Adam.
        ramp, guard: budget controllers, for a local embedding.
    """

    def __init__(
        self,
        embedding: nn.Module,
        model: nn.Module,
        *,
        lr: float,
        ramp: Ramp | None = None,
        guard: Guard | None = None,
    ) -> None:
        self.embedding, self.model = embedding, model
        self.ramp, self.guard = ramp, guard
        self.optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        self.criterion = nn.BCEWithLogitsLoss()
        self.drift = DriftDetector()
        self.step_number = 0

    def step(self, batch: Clicks, between: Callable[[], None] | None = None) -> F32:
        """Predict a batch, then train on it; returns the predicted probabilities.

        Args:
            between: called after the rows have come and before anything is changed; where a
                sharded run fixes its checkpoints.
        """
        vectors = self.embedding(torch.from_numpy(batch.ids))
        if between is not None:
            between()
        logits = self.model(vectors, dense_tensor(batch))
        scores = torch.sigmoid(logits.detach()).numpy()
        loss = self.criterion(logits, torch.from_numpy(batch.labels))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if isinstance(self.embedding, FiitedEmbeddingBag):
            self.embedding.end_step()
        self.step_number += 1
        if self.ramp is not None and self.step_number <= self.ramp.steps + 1:
            self._set_slots(self.ramp.slots(self.step_number))
        return np.asarray(scores, np.float32)

    def score(self, batch: Clicks, mask_below: float = 0.0) -> F32:
        """Probabilities without training; ``mask_below`` hides chunks of a smaller utility."""
        was = self.embedding.training
        self.embedding.eval()
        with torch.no_grad():
            if mask_below and isinstance(self.embedding, FiitedEmbeddingBag):
                out, _ = self.embedding.store.lookup(list(batch.ids.T), mask_below=mask_below)
                vectors = torch.from_numpy(out)
            else:
                vectors = self.embedding(torch.from_numpy(batch.ids))
            logits = self.model(vectors, dense_tensor(batch))
        self.embedding.train(was)
        return np.asarray(torch.sigmoid(logits).numpy(), np.float32)

    def check_quality(self, batch: Clicks) -> Decision | None:
        """Score a slice with and without the marginal chunks; let the guard set the budget."""
        if self.guard is None or not isinstance(self.embedding, FiitedEmbeddingBag):
            return None
        if self.ramp is not None and self.step_number <= self.ramp.steps:
            return None  # the budget is still on its way down
        store = self.embedding.store
        counters = store.engine.counters()
        threshold = max(counters["cut_score"], 0.0) / max(counters["scale"], 1.0)
        part = batch.rows(0, max(GUARD_MIN, int(len(batch) * GUARD_SHARE)))
        plain = log_loss(self.score(part), part.labels)
        masked = log_loss(self.score(part, MARGIN * threshold), part.labels)
        decision = self.guard.check(plain, masked)
        self._set_slots(decision.slots)
        return decision

    def end_window(self, summary: dict[str, float]) -> bool:
        """Note a window's loss; on drift one full round moves memory at once. True on drift."""
        drifted = self.drift.update(summary["normalised_entropy"])
        if drifted and isinstance(self.embedding, FiitedEmbeddingBag):
            self.embedding.adjust()
        return drifted

    def state_dict(self) -> dict[str, Any]:
        """The dense net, its optimizer and the detector; the tables are saved by the store."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "drift": list(self.drift.state),
            "step": self.step_number,
            "guard": None if self.guard is None else [self.guard.slots, self.guard.calm],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.drift.state = list(state["drift"])
        self.step_number = int(state["step"])
        if self.guard is not None and state["guard"] is not None:
            self.guard.slots, self.guard.calm = state["guard"]

    def _set_slots(self, slots: int) -> None:
        assert isinstance(self.embedding, FiitedEmbeddingBag)
        store = self.embedding.store
        if slots != store.slots:
            store.set_budget(max(slots, len(store.tables)))


def log_loss(p: npt.NDArray[Any], y: F32) -> float:
    """Mean log-loss in nats."""
    q = np.clip(np.asarray(p, np.float64), 1e-7, 1 - 1e-7)
    return float(-np.mean(y * np.log(q) + (1 - y) * np.log(1 - q)))


def dense_tensor(batch: Clicks) -> torch.Tensor | None:
    """Dense features, or None where the log has none."""
    return torch.from_numpy(batch.dense) if batch.dense.shape[1] else None
