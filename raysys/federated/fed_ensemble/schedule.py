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
from raysys.federated.core.randomness import Purpose, hashed

STARVED_ROUNDS = 3
StateArrays = dict[str, npt.NDArray[Any]]


class PermutationSchedule:
    """Places clients on models and counts who trained what.

    Args:
        k: number of models. n_clients: size of the population. seed: of the permutations.
        strata: "client" (each client is a stratum of its own), a number of groups into which
            clients are hashed, or "random" (no schedule).
        balance: whether arrivals of a round may be moved to thin models. Off where a client's
            model may depend on its own past only: under central privacy, and where it starts long
            before it arrives.

    Raises:
        ConfigError: fewer than one model or stratum, or more models than clients.
    """

    def __init__(
        self,
        k: int,
        n_clients: int,
        seed: int,
        strata: str | int = "client",
        balance: bool = True,
    ) -> None:
        if not 1 <= k <= n_clients:
            raise ConfigError("k", k, f"1 to the population of {n_clients}")
        good = strata in ("client", "random") or (isinstance(strata, int) and strata >= 1)
        if not good:
            raise ConfigError("strata", strata, "'client', 'random' or a number of groups")
        self.k = k
        self.strata = strata
        self._seed = seed
        self._balances = balance and k > 1
        self._counter = np.zeros(n_clients, dtype=np.int64)
        self._swapped: dict[int, tuple[int, IntArray]] = {}
        self._starved = np.zeros(k, dtype=np.int64)

    def permutation(self, stratum: int, age: int) -> IntArray:
        """The order in which a stratum visits the models in an age, int64 [K]."""
        order: IntArray = self._permutations(np.array([stratum]), np.array([age]))[0]
        return order

    def strata_of(self, clients: IntArray) -> IntArray:
        """The clients themselves, or the groups they are hashed into."""
        if not isinstance(self.strata, int):
            return clients
        drawn = hashed(self._seed, Purpose.SCHEDULE, clients) % np.uint64(self.strata)
        groups: IntArray = drawn.astype(np.int64)
        return groups

    def stratum(self, client: int) -> int:
        """The stratum of one client."""
        return int(self.strata_of(np.array([client]))[0])

    def next_model(self, client: int, round_id: int = 0) -> int:
        """Model that a client trains next; does not advance anything."""
        return int(self.next_models(np.array([client]), round_id)[0])

    def next_models(self, clients: IntArray, round_id: int = 0) -> IntArray:
        """Models that clients train next, int64 [k]."""
        if self.strata == "random":
            drawn = hashed(self._seed, Purpose.SCHEDULE, clients, round_id) % np.uint64(self.k)
            chosen: IntArray = drawn.astype(np.int64)
            return chosen
        if isinstance(self.strata, int):
            ages = np.full(len(clients), round_id // self.k)
            orders = self._permutations(self.strata_of(clients), ages)
            models: IntArray = orders[:, round_id % self.k]
            return models
        places, orders = self._orders(clients)
        own: IntArray = orders[np.arange(len(clients)), places]
        return own

    def place(self, clients: IntArray, round_id: int, counts: IntArray) -> IntArray:
        """Place arriving clients, given how many each model has in this round so far.

        Where one model has more than twice as many as another, the newest arrivals move to the
        thinnest by swapping two entries of their own permutation, so coverage stays exact.

        Returns:
            Model of each client, int64 [k]; ``counts`` [K] is updated in place.
        """
        if self.strata != "client":
            models: IntArray = self.next_models(clients, round_id)
            counts += np.bincount(models, minlength=self.k)
            return models
        places, orders = self._orders(clients)
        models = orders[np.arange(len(clients)), places]
        counts += np.bincount(models, minlength=self.k)
        held = counts.tolist()
        if self._balances and max(held) > 2 * min(held):
            self._balance(clients, models, counts, places, orders)
        return models

    def accept(self, clients: IntArray) -> None:
        """Count accepted updates of different clients; only then do permutations advance."""
        self._counter[clients] += 1
        for client in self._swapped.keys() & set(clients.tolist()) if self._swapped else ():
            if self._counter[client] % self.k == 0:  # that age is over
                del self._swapped[client]

    def close_round(self, counts: IntArray) -> list[int]:
        """Note which models received nothing; returns those starved for three rounds or more."""
        self._starved += 1
        self._starved[counts > 0] = 0
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

    def _permutations(self, strata: IntArray, ages: IntArray) -> IntArray:
        """One permutation a row, int64 [n, K]: the models in order of their keyed hashes."""
        keys = hashed(
            self._seed, Purpose.SCHEDULE, strata[:, None], ages[:, None], np.arange(self.k)
        )
        return np.argsort(keys, axis=1, kind="stable").astype(np.int64)

    def _orders(self, clients: IntArray) -> tuple[IntArray, IntArray]:
        """Each client's place in its age, int64 [k], and its order of that age, int64 [k, K]."""
        ages, places = np.divmod(self._counter[clients], self.k)
        orders = self._permutations(clients, ages)
        for row, client in enumerate(clients.tolist() if self._swapped else ()):
            if client in self._swapped:
                age, order = self._swapped[client]
                if age == ages[row]:
                    orders[row] = order
        return places, orders

    def _balance(
        self,
        clients: IntArray,
        models: IntArray,
        counts: IntArray,
        places: IntArray,
        orders: IntArray,
    ) -> None:
        held, placed, starved = counts.tolist(), models.tolist(), self._starved.tolist()
        for row in range(len(placed) - 1, -1, -1):
            least, full = min(held), placed[row]
            thin = held.index(least)
            if max(held) <= max(2 * least, 1):
                break
            uneven = held[full] > 2 * least and held[full] - least >= 2
            starving = starved[thin] >= STARVED_ROUNDS and least == 0
            if full == thin or not (uneven or starving):
                continue
            if self._swap(int(clients[row]), thin, int(places[row]), orders[row]):
                models[row] = thin
                held[full] -= 1
                held[thin] += 1
        counts[:] = held

    def _swap(self, client: int, model: int, place: int, order: IntArray) -> bool:
        """Bring ``model`` to the client's next place; False if that age has had it."""
        swapped = order.copy()
        other = int(np.flatnonzero(order == model)[0])
        if other < place:
            return False
        swapped[place], swapped[other] = order[other], order[place]
        self._swapped[client] = (int(self._counter[client]) // self.k, swapped)
        return True
