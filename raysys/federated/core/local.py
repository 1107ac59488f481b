"""What a client does in a round: batches, steps and the optimiser of its local training."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt

from raysys.config import check, check_range

IntArray = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LocalConfig:
    """Local training by minibatch SGD.

    Args:
        epochs: passes over the client's samples; give this or ``steps``.
        steps: number of SGD steps; None means "by epochs".
        batch_size: samples per step; a client with fewer uses all that it has.
        lr: learning rate. momentum: classical momentum in [0, 1). weight_decay: L2 coefficient.
        prox_mu: coefficient of FedProx's ``mu (w - w0)``; 0 is plain SGD.
        lr_decay, decay_every: the rate is multiplied by ``lr_decay`` after every so many rounds.
    """

    epochs: int = 1
    steps: int | None = None
    batch_size: int = 10
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    prox_mu: float = 0.0
    lr_decay: float = 1.0
    decay_every: int = 10

    def __post_init__(self) -> None:
        check_range(self, "epochs", 1)
        if self.steps is not None:
            check(self, "steps", self.steps >= 1, "None or a number of at least 1")
        check_range(self, "batch_size", 1)
        check_range(self, "lr", 0, low_open=True)
        check_range(self, "momentum", 0, 1, high_open=True)
        check_range(self, "weight_decay", 0)
        check_range(self, "prox_mu", 0)
        check_range(self, "lr_decay", 0, 1, low_open=True)
        check_range(self, "decay_every", 1)

    def at_round(self, round_id: int) -> LocalConfig:
        """The configuration of one round, with its own learning rate and no decay left."""
        if self.lr_decay == 1.0:
            return self
        lr = self.lr * self.lr_decay ** (round_id // self.decay_every)
        return dataclasses.replace(self, lr=lr, lr_decay=1.0)

    def steps_of(self, counts: IntArray) -> IntArray:
        """SGD steps of clients with ``counts`` samples, int64; 0 for a client without samples."""
        per_epoch = -(-counts // self.batch_size)
        wanted = per_epoch * self.epochs if self.steps is None else np.full_like(counts, self.steps)
        return np.where(counts > 0, wanted, 0)

    def epochs_for(self, n_samples: int) -> int:
        """Shuffles of the data that the steps of a client with ``n_samples`` consume."""
        if self.steps is None:
            return self.epochs
        return math.ceil(self.steps / math.ceil(n_samples / self.batch_size))
