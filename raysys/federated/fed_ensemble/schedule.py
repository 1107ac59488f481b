"""Which of the K models a client trains next: permutations, so that each trains each once an age.

Late binding: a client's j-th accepted participation trains ``perm(client, j // K)[j % K]``, drawn
from a keyed stream, so nothing is stored but a counter and any order of arrival will do. The paper
fixes strata and rounds; there ``strata=Q`` follows it, and "random" is the ablation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from raysys.errors import ConfigError
from raysys.federated.core.messages import IntArray
from raysys.federated.core.randomness import KeyedStreams, Purpose

STARVED_ROUNDS = 3
StateArrays = dict[str, npt.NDArray[Any]]


class PermutationSchedule:
    """Places clients on models and counts who trained what.

    Args:
        k: number of models. n_clients: size of the population. seed: of the permutations.
        strata: "client" (each client is a stratum of its own), a number of groups into which
            clients are hashed, or "random" (no schedule).

    Raises:
        ConfigError: fewer than one model or stratum, or more models than clients.
    """

    def __init__(self, k: int, n_clients: int, seed: int, strata: str | int = "client") -> None:
        if not 1 <= k <= n_clients:
            raise ConfigError("k", k, f"1 to the population of {n_clients}")
        good = strata in ("client", "random") or (isinstance(strata, int) and strata >= 1)
        if not good:
            raise ConfigError("strata", strata, "'client', 'random' or a number of groups")
        self.k = k
        self.strata = strata
        self._seed = seed
        self._streams = KeyedStreams(seed, Purpose.SCHEDULE)
        self._counter = np.zeros(n_clients, dtype=np.int64)
        self._swapped: dict[int, tuple[int, IntArray]] = {}
        self._starved = np.zeros(k, dtype=np.int64)

    def permutation(self, stratum: int, age: int) -> IntArray:
        """The order in which a stratum visits the models in an age, int64 [K]."""
        streams = KeyedStreams(self._seed, Purpose.SCHEDULE, age)
        return np.argsort(streams.raw(stratum, self.k), kind="stable").astype(np.int64)

    def stratum(self, client: int) -> int:
        """The client itself, or the group it is hashed into."""
        if not isinstance(self.strata, int):
            return client
        return int(self._streams.raw(client, 1)[0] % np.uint64(self.strata))

    def next_model(self, client: int, round_id: int = 0) -> int:
        """Model that a client trains next; does not advance anything."""
        if self.strata == "random":
            streams = KeyedStreams(self._seed, Purpose.SCHEDULE, round_id)
            return int(streams.raw(client, 1)[0] % np.uint64(self.k))
        if isinstance(self.strata, int):
            order = self.permutation(self.stratum(client), round_id // self.k)
            return int(order[round_id % self.k])
        age, place = divmod(int(self._counter[client]), self.k)
        return int(self._order(client, age)[place])

    def place(self, clients: IntArray, round_id: int, counts: IntArray) -> IntArray:
        """Place arriving clients, given how many each model has in this round so far.

        Where one model has more than twice as many as another, the newest arrivals move to the
        thinnest by swapping two entries of their own permutation, so coverage stays exact.

        Returns:
            Model of each client, int64 [k]; ``counts`` [K] is updated in place.
        """
        models = np.array([self.next_model(int(c), round_id) for c in clients], dtype=np.int64)
        np.add.at(counts, models, 1)
        if self.strata == "client" and self.k > 1:
            self._balance(clients, models, counts)
        return models

    def accept(self, client: int, model: int) -> None:
        """Count an accepted update; only then does the client's permutation advance."""
        self._counter[client] += 1
        if self._counter[client] % self.k == 0:
            self._swapped.pop(client, None)
        del model

    def close_round(self, counts: IntArray) -> list[int]:
        """Note which models received nothing; returns those starved for three rounds or more."""
        self._starved = np.where(counts > 0, 0, self._starved + 1)
        starved: list[int] = np.flatnonzero(self._starved >= STARVED_ROUNDS).tolist()
        return starved

    def state(self) -> StateArrays:
        """Counters, swaps of unfinished ages, and starvation."""
        clients = np.array(list(self._swapped), dtype=np.int64)
        orders = [order for _, order in self._swapped.values()]
        ages = np.array([age for age, _ in self._swapped.values()], dtype=np.int64)
        table = np.stack(orders) if orders else np.zeros((0, self.k), dtype=np.int64)
        return {
            "counter": self._counter,
            "swapped.clients": clients,
            "swapped.ages": ages,
            "swapped.orders": table,
            "starved": self._starved,
        }

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore :meth:`state`.

        Raises:
            ConfigError: it is of another K or another population.
        """
        shape = (len(state["starved"]), len(state["counter"]))
        if shape != (self.k, len(self._counter)):
            raise ConfigError("checkpoint", shape, f"K and clients {self.k, len(self._counter)}")
        self._counter = np.array(state["counter"], dtype=np.int64)
        self._starved = np.array(state["starved"], dtype=np.int64)
        parts = zip(state["swapped.clients"], state["swapped.ages"], state["swapped.orders"])
        self._swapped = {int(c): (int(age), np.array(order)) for c, age, order in parts}

    def _order(self, client: int, age: int) -> IntArray:
        swapped = self._swapped.get(client)
        if swapped is not None and swapped[0] == age:
            return swapped[1]
        return self.permutation(client, age)

    def _balance(self, clients: IntArray, models: IntArray, counts: IntArray) -> None:
        for place in range(len(clients) - 1, -1, -1):
            thin = int(np.argmin(counts))
            full = int(models[place])
            uneven = counts[full] > 2 * counts[thin] and counts[full] - counts[thin] >= 2
            starving = self._starved[thin] >= STARVED_ROUNDS and counts[thin] == 0
            if full != thin and (uneven or starving) and self._swap(int(clients[place]), thin):
                models[place] = thin
                counts[full] -= 1
                counts[thin] += 1

    def _swap(self, client: int, model: int) -> bool:
        """Bring ``model`` to the client's next place; False if that age has had it."""
        age, place = divmod(int(self._counter[client]), self.k)
        order = self._order(client, age).copy()
        other = int(np.flatnonzero(order == model)[0])
        if other < place:
            return False
        order[place], order[other] = order[other], order[place]
        self._swapped[client] = (age, order)
        return True
