"""Cohorts that something else decides: the common part of oracle, random, and rival methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from raysys.errors import ConfigError
from raysys.federated.core.aggregation import ModelSum
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.messages import FeedbackSpec, IntArray
from raysys.federated.core.model import FlatWeights, ModelSpec
from raysys.federated.core.strategy import Assignment, Demand, JobFacts, RoundReport, StateArrays


class GroupedLines:
    """One model line per group; ``group_of`` says whose model a client trains.

    Args:
        groups: number of lines. make_inner: builds one; ``members`` numbers independent starts.
        group_of: int64 [n], or None for everybody in the first line.
        independent: start every line from weights of its own.
    """

    def __init__(
        self,
        groups: int,
        clients_per_round: int,
        make_inner: Callable[[], FedAvg],
        group_of: IntArray | None = None,
        independent: bool = False,
    ) -> None:
        if groups < 1:
            raise ConfigError("groups", groups, "at least 1")
        self.lines = [make_inner() for _ in range(groups)]
        self.clients_per_round = clients_per_round
        self.extra_downloads = 0
        self._make_inner = make_inner
        self._independent = independent
        self._given = group_of
        self._facts: JobFacts | None = None
        self._group_of = np.zeros(0, dtype=np.int64)

    @property
    def facts(self) -> JobFacts:
        """What the job told the strategy when it started."""
        if self._facts is None:
            raise ConfigError("strategy", "not started", "start() before use")
        return self._facts

    def start(self, facts: JobFacts) -> None:
        """Start every line."""
        self._facts = facts
        for member, line in enumerate(self.lines):
            number = member if self._independent else 0
            line.start(dataclasses.replace(facts, member=number))
        n = facts.population.n_clients
        given = np.zeros(n, dtype=np.int64) if self._given is None else self._given
        if len(given) != n:
            raise ConfigError("group_of", len(given), f"a group for each of {n} clients")
        self._group_of = np.array(given, dtype=np.int64)

    def groups(self, clients: IntArray) -> IntArray:
        """Group of each client now."""
        found: IntArray = self._group_of[clients]
        return found

    def demand(self, round_id: int) -> list[Demand]:
        """One stream."""
        return [Demand(clients=self.clients_per_round)]

    def assign(self, round_id: int, clients: IntArray) -> list[Assignment]:
        """Everybody trains the model of its group."""
        groups = self.groups(clients)
        return [
            dataclasses.replace(part, model_id=group)
            for group in np.unique(groups).tolist()
            for part in self.lines[group].assign(round_id, clients[groups == group])
        ]

    def model_spec(self, model_id: int) -> ModelSpec:
        """All lines have one architecture."""
        return self.lines[model_id].spec

    def local_config(self, round_id: int) -> LocalConfig:
        """That of the lines."""
        return self.lines[0].local

    def weights(self, model_id: int) -> FlatWeights:
        """Current weights of a line."""
        return self.lines[model_id].weights(0)

    def stacked(self) -> npt.NDArray[np.float32]:
        """Weights of all lines, float32 [groups, P]."""
        return np.stack([line.weights(0) for line in self.lines])

    def feedback_spec(self) -> FeedbackSpec:
        """What the lines ask for."""
        return self.lines[0].feedback_spec()

    def controls(self, clients: IntArray) -> npt.NDArray[np.float32] | None:
        """No corrections."""
        return None

    def fold(self, round_id: int, model_id: int, total: ModelSum) -> None:
        """Hand the sums to the line."""
        self.lines[model_id].fold(round_id, 0, total)

    def close(self, round_id: int, report: RoundReport) -> None:
        """Server step of every line."""
        for line in self.lines:
            line.close(round_id, report)

    def predict_plan(self, client: int) -> list[tuple[int, float]]:
        """The model of the client's group."""
        return [(int(self.groups(np.array([client], dtype=np.int64))[0]), 1.0)]

    def branch(self, group: int) -> int:
        """A new line that starts from another's weights and optimiser; returns its number."""
        line = self._make_inner()
        line.start(self.facts)
        line.load({name: np.array(value) for name, value in self.lines[group].state().items()})
        self.lines.append(line)
        return len(self.lines) - 1

    def state(self) -> StateArrays:
        """Every line and the groups."""
        lines = {
            f"line{k}.{name}": value
            for k, line in enumerate(self.lines)
            for name, value in line.state().items()
        }
        return {"groups": np.array([len(self.lines)]), "group_of": self._group_of, **lines}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore :meth:`state`."""
        if "group_of" not in state:
            raise ConfigError("state", sorted(state)[:4], "a state of grouped lines")
        while len(self.lines) < int(state["groups"][0]):
            self.branch(0)
        for k, line in enumerate(self.lines):
            prefix = f"line{k}."
            line.load({n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)})
        self._group_of = np.array(state["group_of"], dtype=np.int64)


def random_groups(clients: int, groups: int, seed: int) -> IntArray:
    """Groups that mean nothing: what several models cost without the right members."""
    return np.random.default_rng([seed, 77]).integers(groups, size=clients)
