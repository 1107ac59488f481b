"""HeteroFL, FedRolex and FLuID: every device trains a part of one global model.

They differ in which hidden units a device of a given level gets:

* HeteroFL (Diao et al., ICLR 2021): always the first ones, so that models are nested;
* FedRolex (Alam et al., NeurIPS 2022): a window that moves on by one unit each round;
* FLuID (Wang et al., NeurIPS 2023): those that changed most; "invariant" units are dropped. The
  threshold of the paper is tuned until enough units fall below it, which is a ranking.

The server averages each coordinate over those who held it. HeteroFL's scaler and masked loss are
left out: without normalisation layers the first has no counterpart, the second is for label skew
alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from raysys.config import check_choice
from raysys.errors import ConfigError, InfeasibleError
from raysys.federated.core.aggregation import ModelSum
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.messages import FeedbackSpec, IntArray
from raysys.federated.core.model import FlatWeights, Mlp, ModelSpec, initial_weights
from raysys.federated.core.strategy import Assignment, Demand, JobFacts, RoundReport, StateArrays

RATIOS = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)
RULES = ("heterofl", "fedrolex", "fluid")
MEMORY = 0.9  # decay of FLuID's running measure of change


def mlp_macs(sizes: Sequence[int]) -> int:
    """Multiply-accumulates of one sample through a perceptron."""
    return sum(inner * outer for inner, outer in itertools.pairwise(sizes))


class Submodels:
    """One global perceptron, trained in parts.

    Args:
        sizes: the full model, input and output included. rule: "heterofl", "fedrolex", "fluid".
        ratios: widths of the levels as shares of the full hidden widths; at least one unit stays.
        sample_s: seconds a device may spend on a sample, as in FedTrans.
    """

    def __init__(
        self,
        sizes: tuple[int, ...],
        local: LocalConfig,
        clients_per_round: int,
        rule: str = "heterofl",
        ratios: Sequence[float] = RATIOS,
        sample_s: float = 1.0,
    ) -> None:
        self.rule = rule
        check_choice(self, "rule", RULES)
        self.sizes = sizes
        self.local = local
        self.clients_per_round = clients_per_round
        self.level_sizes = [
            (sizes[0], *(max(1, round(width * ratio)) for width in sizes[1:-1]), sizes[-1])
            for ratio in ratios
        ]
        self.level_macs = [mlp_macs(level) for level in self.level_sizes]
        self._specs = [ModelSpec(architecture=Mlp(sizes=level)) for level in self.level_sizes]
        self._sample_s = sample_s
        self._capacity = np.empty(0)
        self._round = 0
        self._values: FlatWeights = np.empty(0, dtype=np.float32)
        self._change = [np.zeros(width) for width in sizes[1:-1]]
        self._folded: dict[int, ModelSum] = {}

    def start(self, facts: JobFacts) -> None:
        """Draw the full model.

        Raises:
            InfeasibleError: too few devices can run the smallest level.
        """
        n = facts.population.n_clients
        rates = facts.population.rate_mac_s
        self._capacity = np.full(n, np.inf) if rates is None else rates * self._sample_s
        able = int((self._capacity >= min(self.level_macs)).sum())
        if able < self.clients_per_round:
            raise InfeasibleError(
                f"{self.clients_per_round} clients a round",
                f"only {able} of {n} devices can run the smallest level",
                "Add a smaller ratio",
            )
        full = ModelSpec(architecture=Mlp(sizes=self.sizes))
        self._values = initial_weights(full, facts.seed, facts.member).values

    def level_of(self, clients: IntArray) -> IntArray:
        """The widest level that fits each client, int64 [k]; the narrowest where none does."""
        fits = np.asarray(self.level_macs)[None, :] <= self._capacity[clients][:, None]
        widest = np.argsort(self.level_macs)[::-1]
        chosen = widest[np.argmax(fits[:, widest], axis=1)]
        return np.where(fits.any(axis=1), chosen, widest[-1]).astype(np.int64)

    def model_spec(self, model_id: int) -> ModelSpec:
        """Spec of a level."""
        return self._specs[model_id]

    def demand(self, round_id: int) -> list[Demand]:
        """Devices that can run the smallest level."""
        needed = min(self.level_macs) / self._sample_s
        return [Demand(clients=self.clients_per_round, min_mac_s=needed)]

    def assign(self, round_id: int, clients: IntArray) -> list[Assignment]:
        """Every device trains the widest level that it can."""
        self._round = round_id
        levels = self.level_of(clients)
        return [
            Assignment(
                clients=clients[levels == level], model_id=level, version=round_id, local=self.local
            )
            for level in np.unique(levels).tolist()
        ]

    def local_config(self, round_id: int) -> LocalConfig:
        """The one configuration."""
        return self.local

    def weights(self, model_id: int) -> FlatWeights:
        """A level's part of the global model in the current round, float32 [P of the level]."""
        return self._values[self._positions(model_id)]

    def feedback_spec(self) -> FeedbackSpec:
        """Nothing beyond the sums."""
        return FeedbackSpec()

    def controls(self, clients: IntArray) -> npt.NDArray[np.float32] | None:
        """No corrections."""
        return None

    def fold(self, round_id: int, model_id: int, total: ModelSum) -> None:
        """Keep a level's sums until the round closes."""
        self._folded[model_id] = total

    def close(self, round_id: int, report: RoundReport) -> None:
        """Average every coordinate over the clients that held it."""
        delta, weight = np.zeros(len(self._values)), np.zeros(len(self._values))
        for level, total in self._folded.items():
            place = self._positions(level)
            delta[place] += total.delta
            weight[place] += total.weight
        self._folded = {}
        moved = np.divide(delta, weight, out=np.zeros_like(delta), where=weight > 0)
        self._note_change(moved, weight > 0)
        self._values = (self._values + moved).astype(np.float32)
        self._round = round_id + 1

    def predict_plan(self, client: int) -> list[tuple[int, float]]:
        """The client's level."""
        return [(int(self.level_of(np.array([client]))[0]), 1.0)]

    def state(self) -> StateArrays:
        """Weights, round, and the units' running change."""
        change = {f"change{n}": values for n, values in enumerate(self._change)}
        return {"weights": self._values, "round": np.array([self._round]), **change}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore :meth:`state`.

        Raises:
            ConfigError: the state is of another full model.
        """
        if len(state.get("weights", ())) != len(self._values):
            raise ConfigError("state", sorted(state), f"a model of sizes {self.sizes}")
        self._values = np.array(state["weights"], dtype=np.float32)
        self._round = int(state["round"][0])
        self._change = [np.array(state[f"change{n}"]) for n in range(len(self._change))]

    def units(self, level: int) -> list[IntArray]:
        """Hidden units of a level in the current round, by layer; sorted."""
        found = []
        for layer, (full, part) in enumerate(zip(self.sizes[1:-1], self.level_sizes[level][1:-1])):
            if self.rule == "fedrolex":
                chosen = (self._round + np.arange(part)) % full
            elif self.rule == "fluid":
                chosen = np.argsort(-self._change[layer], kind="stable")[:part]
            else:
                chosen = np.arange(part)
            found.append(np.sort(chosen).astype(np.int64))
        return found

    def _positions(self, level: int) -> IntArray:
        """Where a level's parameters lie in the full flat buffer, int64 [P of the level]."""
        ends = [np.arange(self.sizes[0]), *self.units(level), np.arange(self.sizes[-1])]
        found, offset = [], 0
        for layer, (inner, outer) in enumerate(itertools.pairwise(ends)):
            wide, high = self.sizes[layer], self.sizes[layer + 1]
            found.append((offset + outer[:, None] * wide + inner[None, :]).ravel())
            found.append(offset + wide * high + outer)
            offset += (wide + 1) * high
        return np.concatenate(found)

    def _note_change(self, moved: npt.NDArray[np.float64], held: npt.NDArray[np.bool_]) -> None:
        """Relative change of each hidden unit's incoming weights; units nobody held keep theirs."""
        offset = 0
        for layer, (inner, outer) in enumerate(zip(self.sizes, self.sizes[1:-1])):
            block = slice(offset, offset + inner * outer)
            step = np.linalg.norm(moved[block].reshape(outer, inner), axis=1)
            size = np.linalg.norm(self._values[block].reshape(outer, inner), axis=1)
            seen = held[block].reshape(outer, inner).any(axis=1)
            change = MEMORY * self._change[layer] + (1 - MEMORY) * step / np.maximum(size, 1e-8)
            self._change[layer] = np.where(seen, change, self._change[layer])
            offset += (inner + 1) * outer
