"""The streaming recorder: called after each forward pass with (ids, logits, labels).

It reads what training computes anyway, in training mode on augmented batches (as the paper does),
keeps a short ring of results on the device, and hands :class:`StatBatch` values to a sink.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from raysys.errors import ConfigError
from raysys.training.ccs.dynamics import Margin, StatBatch, check_batch, row_statistics

Sink = Callable[[StatBatch], object]


class DynamicsRecorder:
    """Records training dynamics with one call per step.

    Args:
        sink: receives each :class:`StatBatch`: a ``ScoreAccumulator.add``, or a call on an actor.
        rank: this worker's rank; part of the order in which batches are applied.
        ring: steps kept on the device before they are handed over together.
        margin: ``"prob"`` or ``"logit"`` (see :func:`row_statistics`).

    Raises:
        ConfigError: ``ring`` below one, bad ids or labels, or NaN logits (training diverged).
    """

    def __init__(
        self, sink: Sink, *, rank: int = 0, ring: int = 16, margin: Margin = "prob"
    ) -> None:
        if ring < 1:
            raise ConfigError("ring", ring, "a number of steps >= 1")
        self._sink = sink
        self._rank = rank
        self._ring = ring
        self._margin = margin
        self._pending: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._epoch = 0
        self._sequence = 0

    @property
    def epoch(self) -> int:
        return self._epoch

    def start_epoch(self, epoch: int) -> None:
        """Begin an epoch, counted from 0; what is pending goes out under the previous one."""
        if epoch < 0:
            raise ConfigError("epoch", epoch, "an epoch >= 0")
        self.flush()
        self._epoch, self._sequence = epoch, 0

    def record(self, ids: Any, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Record a batch.

        Args:
            ids: example ids, int64 (B,), a tensor or anything ``torch.as_tensor`` takes.
            logits: (B, C), any float type; half precision is read as float32.
            labels: int64 class indices (B,).
        """
        id_tensor = torch.as_tensor(ids)
        check_batch(id_tensor, logits, labels)
        stats = row_statistics(logits, labels, self._margin)
        # With a GPU the copies overlap with the rest of the step; flush() waits for them.
        on_device = stats.device.type != "cpu"
        if on_device:
            stats = stats.to("cpu", non_blocking=True)
        self._pending.append((id_tensor, labels.detach(), stats))
        if len(self._pending) >= self._ring:
            self.flush()

    def flush(self) -> None:
        """Hand everything pending to the sink as one batch."""
        if not self._pending:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ids, labels, stats = zip(*self._pending)
        self._pending = []
        id_array = torch.cat([part.cpu() for part in ids]).numpy().astype(np.int64)
        label_array = torch.cat([part.cpu() for part in labels]).numpy().astype(np.int64)
        values = torch.cat(stats, dim=1).numpy()
        bad = ~np.isfinite(values).all(axis=0)
        if bad.any():
            where = f"NaN in epoch {self._epoch}, ids {id_array[bad][:5].tolist()}"
            remedy = "Training diverged: lower the learning rate, or resume an earlier checkpoint"
            raise ConfigError("logits", where, "finite logits", remedy)
        margin, p_true, el2n, right = values
        batch = StatBatch(
            self._epoch, self._rank, self._sequence, id_array, label_array,
            margin, p_true, el2n, right > 0.5,
        )  # fmt: skip
        self._sequence += 1
        self._sink(batch)
