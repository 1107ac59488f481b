"""Which model suits which client: utilities, soft assignment under capacity, deployment.

Section 4 of the paper. A utility is a float32 per client and model: a million clients and eight
models are 32 MB. A new model's column is a copy of its parent's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from raysys.errors import ConfigError
from raysys.federated.core.messages import IntArray
from raysys.federated.core.randomness import Purpose, hashed
from raysys.federated.fedtrans.config import AssignmentConfig

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
LARGEST_Z = 3.0


class ClientManager:
    """Utilities of all clients.

    Args:
        capacity: multiply-accumulates per sample that each client's device can afford, [n].
    """

    def __init__(self, capacity: FloatArray, config: AssignmentConfig, seed: int) -> None:
        self.capacity = capacity
        self._config = config
        self._seed = seed
        self._utility = np.zeros((len(capacity), 1), dtype=np.float32)
        self._seen = np.zeros(len(capacity), dtype=bool)

    @property
    def models(self) -> int:
        """Number of models that have a column."""
        return self._utility.shape[1]

    def resize(self, clients: IntArray, capacity: FloatArray) -> None:
        """Take note that devices can afford something else from now on, [k] multiply-accumulates.

        Raises:
            ConfigError: a capacity that is not a finite number above 0.
        """
        wrong = np.flatnonzero(~np.isfinite(capacity) | (capacity <= 0))
        if wrong.size:
            row = int(wrong[0])
            name = f"capacity[{int(clients[row])}]"
            raise ConfigError(name, float(capacity[row]), "a finite number above 0")
        self.capacity = self.capacity.copy()
        self.capacity[clients] = capacity

    def inherit(self, parent: int) -> None:
        """Add a model whose utilities are its parent's and the head start."""
        column = self._utility[:, parent : parent + 1] + np.float32(self._config.head_start)
        self._utility = np.concatenate([self._utility, column], axis=1)

    def compatible(self, clients: IntArray, macs: Sequence[int], active: BoolArray) -> BoolArray:
        """Which models each client may train, bool [k, models]."""
        fits = np.asarray(macs, dtype=np.float64)[None, :] <= self.capacity[clients][:, None]
        allowed: BoolArray = fits & active[None, :]
        return allowed

    def utility(self, clients: IntArray) -> FloatArray:
        """Utilities, float64 [k, models]; a client that never trained has the population's mean."""
        found = self._utility[clients].astype(np.float64)
        fresh = ~self._seen[clients]
        if fresh.any() and self._seen.any():
            found[fresh] = self._utility[self._seen].mean(axis=0, dtype=np.float64)
        return found

    def place(self, round_id: int, clients: IntArray, allowed: BoolArray) -> IntArray:
        """Draw a model for each client from the softmax of its utilities; -1 where none fits.

        A client's draw depends on the round and the client alone, so devices may come one by one.
        """
        logits = np.where(allowed, self.utility(clients) / self._config.temperature, -np.inf)
        any_fits = allowed.any(axis=1)
        logits[~any_fits] = 0.0
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        ends = np.cumsum(weights / weights.sum(axis=1, keepdims=True), axis=1)
        raw = hashed(self._seed, Purpose.SCHEDULE, round_id, clients)
        draw = (raw >> np.uint64(11)).astype(np.float64) / 2.0**53
        placed = np.minimum((ends <= draw[:, None]).sum(axis=1), self.models - 1)
        # Rounding may end the last allowed interval a hair below one.
        wrong = any_fits & ~allowed[np.arange(len(clients)), placed]
        placed[wrong] = self.models - 1 - np.argmax(allowed[wrong][:, ::-1], axis=1)
        return np.where(any_fits, placed, -1).astype(np.int64)

    def best(self, clients: IntArray, allowed: BoolArray, macs: Sequence[int]) -> IntArray:
        """Model to deploy: highest utility among those that fit, at a tie the larger; or -1."""
        order = np.argsort(np.asarray(macs), kind="stable")[::-1]
        logits = np.where(allowed, self.utility(clients), -np.inf)[:, order]
        chosen = order[np.argmax(logits, axis=1)]
        return np.where(allowed.any(axis=1), chosen, -1).astype(np.int64)

    def learn(
        self,
        clients: IntArray,
        models: IntArray,
        losses: FloatArray,
        allowed: BoolArray,
        alike: FloatArray,
    ) -> None:
        """``U[c][k] -= z_c * sim(k, M)`` for every compatible k.

        Only differences between a client's utilities matter: its best is 0, and the others are kept
        within ``bound`` of it. Clipped one by one they would all end at the same bound, since a
        client whose data are easy (or hard) is so for every model.

        Args:
            models: the model that each client trained, int64 [k]. losses: its loss, [k].
            allowed: bool [k, models]. alike: similarity of models, float64 [models, models].
        """
        finite = np.isfinite(losses)
        clients, models, losses, allowed = (
            clients[finite], models[finite], losses[finite], allowed[finite],
        )  # fmt: skip
        if not len(clients):
            return
        z = self._standardised(models, losses)
        utility = self.utility(clients)
        moved = utility - z[:, None] * alike[models]
        highest = np.where(allowed, moved, -np.inf).max(axis=1, keepdims=True)
        moved = np.where(allowed, moved - highest, utility)
        self._utility[clients] = np.clip(moved, -self._config.bound, 0.0).astype(np.float32)
        self._seen[clients] = True

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Utilities of the clients that ever trained, and what devices can afford by now."""
        seen = np.flatnonzero(self._seen)
        return {
            "clients": seen,
            "utility": self._utility[seen],
            "columns": np.array([self.models]),
            "capacity": self.capacity,
        }

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore :meth:`state`.

        Raises:
            ConfigError: the checkpoint is of another population.
        """
        seen = np.asarray(state["clients"], dtype=np.int64)
        capacity = np.array(state["capacity"], dtype=np.float64)
        if len(capacity) != len(self.capacity):
            raise ConfigError("population", len(self.capacity), f"{len(capacity)} clients")
        self.capacity = capacity
        self._utility = np.zeros((len(self.capacity), int(state["columns"][0])), dtype=np.float32)
        self._seen = np.zeros(len(self.capacity), dtype=bool)
        self._utility[seen] = state["utility"]
        self._seen[seen] = True

    def _standardised(self, models: IntArray, losses: FloatArray) -> FloatArray:
        """Loss against the participants of the same model, or of all where these are few."""
        z = np.zeros(len(losses))
        for model in np.unique(models):
            own = models == model
            peers = losses[own] if int(own.sum()) >= self._config.peers else losses
            spread = float(peers.std())
            if spread > 0:
                z[own] = (losses[own] - peers.mean()) / spread
        return np.clip(z, -LARGEST_Z, LARGEST_Z)
