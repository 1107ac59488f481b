"""The strategy interface: a strategy decides who trains what and how updates change models.

Pure Python and arrays, no Ray: the same strategy runs in a test, in one process or over a cluster.
A strategy never sees a single client's update; what needs individuals asks for sketches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from raysys.federated.core.aggregation import ClientTable, ModelSum
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.messages import FeedbackSpec, IntArray
from raysys.federated.core.model import FlatWeights, ModelSpec
from raysys.federated.core.population import Population

if TYPE_CHECKING:  # devices imports Demand from here
    from raysys.federated.core.devices import CostOf, DeviceConfig, Outcome

StateArrays = dict[str, npt.NDArray[Any]]


@dataclasses.dataclass(frozen=True, slots=True)
class JobFacts:
    """What a strategy is told when the job starts; ``member`` numbers independent starts."""

    population: Population
    seed: int
    member: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """Devices that a stream of a round asks for.

    Args:
        clients: number of answers wanted.
        min_mac_s, min_memory_bytes: what a device must have.
        stream: name of the stream, for a strategy that opens several.
        spare: devices offered beyond ``clients``, so that the strategy may decline as many.
    """

    clients: int
    min_mac_s: float = 0.0
    min_memory_bytes: float = 0.0
    stream: str = "all"
    spare: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """Clients that train one model.

    Args:
        clients: int64 [k]. model_id: the strategy's name of the model.
        version: version of the weights they train from.
    """

    clients: IntArray
    model_id: int
    version: int
    local: LocalConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RoundReport:
    """What happened in a round.

    Args:
        counts: clients by status name. table: one row per client.
        attempts: 1, or more where too few updates were kept and the round was repeated.
        bytes_down, bytes_up: what real devices would have moved.
        macs: multiply-accumulates of local training (3 per forward one).
        virtual_s: simulated duration. duration_s: measured, by the caller's clock.
    """

    round_id: int
    attempts: int
    counts: Mapping[str, int]
    loss_first: float
    loss_last: float
    bytes_down: int
    bytes_up: int
    macs: int
    virtual_s: float
    table: ClientTable
    capacity_bias: float | None = None
    busy_s: float = 0.0
    duration_s: float = 0.0

    def of_model(self, model_id: int) -> RoundReport:
        """The report with single updates of one model only, for a strategy of several lines."""
        table = self.table
        if table.updates is None or table.update_row is None or table.update_weight is None:
            return self
        own = table.update_row == model_id
        mine = dataclasses.replace(
            table,
            updates=table.updates[own],
            update_weight=table.update_weight[own],
            update_row=table.update_row[own],
        )
        return dataclasses.replace(self, table=mine)


@runtime_checkable
class SelectsDevices(Protocol):
    """A strategy that decides itself who takes part, as asynchronous ones do."""

    def select(
        self,
        population: Population,
        devices: DeviceConfig,
        cost_of: CostOf,
        seed: int,
        round_id: int,
    ) -> Outcome:
        """Who takes part in a round; the same answer until the round closes."""
        ...


class Strategy(Protocol):
    """Decisions of one federated job; see the module's docstring."""

    def model_spec(self, model_id: int) -> ModelSpec:
        """Spec of one of the strategy's models."""
        ...

    def start(self, facts: JobFacts) -> None:
        """Called once before the first round."""
        ...

    def demand(self, round_id: int) -> list[Demand]:
        """How many devices this round wants, with which needs."""
        ...

    def assign(self, round_id: int, clients: IntArray) -> list[Assignment]:
        """Place granted devices; called with one device or many, in any order."""
        ...

    def local_config(self, round_id: int) -> LocalConfig:
        """Local training of a round, for estimates of cost; changes nothing."""
        ...

    def weights(self, model_id: int) -> FlatWeights:
        """Current weights of a model, float32 [P]."""
        ...

    def feedback_spec(self) -> FeedbackSpec:
        """Weighting, sketches and control variates that this strategy needs."""
        ...

    def controls(self, clients: IntArray) -> npt.NDArray[np.float32] | None:
        """Correction added to each client's gradients, float32 [k, P], or None."""
        ...

    def fold(self, round_id: int, model_id: int, total: ModelSum) -> None:
        """Take the sums of one model."""
        ...

    def close(self, round_id: int, report: RoundReport) -> None:
        """Server step; the round's sums have been folded."""
        ...

    def predict_plan(self, client: int) -> list[tuple[int, float]]:
        """Models and mixing weights that predict for a client."""
        ...

    def state(self) -> StateArrays:
        """Complete state as named arrays; :meth:`load` restores it exactly."""
        ...

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore a state.

        Raises:
            ConfigError: the state is of another model or another kind of strategy.
        """
        ...


class WrappedStrategy:
    """Hands all that a subclass does not define to the strategy inside."""

    def __init__(self, inner: Strategy) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not there yet while unpickling
            raise AttributeError(name)
        return getattr(self.inner, name)
