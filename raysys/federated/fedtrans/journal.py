"""What FedTrans remembers between rounds: losses, activeness, capacities, participants."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from raysys.federated.core.messages import IntArray
from raysys.federated.fedtrans.config import GrowthConfig
from raysys.federated.fedtrans.growth import Transformation, degree_of_convergence, threshold
from raysys.federated.fedtrans.transform import Step

FloatArray = npt.NDArray[np.float64]
RECENT = 20  # rounds that count as recent in reports
MEMORY = 1000  # rounds of participants kept, the most that retirement may ask for


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether it is time to grow, and why or why not.

    Args:
        slope: degree of convergence, loss units a round; None before there are enough rounds.
        limit: the slope at or below which a model counts as converged. rounds: since its birth.
    """

    go: bool
    why: str
    slope: float | None
    limit: float
    rounds: int


@dataclasses.dataclass(frozen=True, slots=True)
class Transition:
    """A decision to grow: in which round, from which model, what was decided, and on what grounds.

    ``verdict`` is None for one that was asked for by hand.
    """

    round_id: int
    parent: int
    plan: Transformation
    verdict: Verdict | None = None


class Journal:
    """Windows over the newest model and over the participants; restarted when a model is born."""

    def __init__(self, config: GrowthConfig) -> None:
        self.round_id = -1
        self.losses: list[float] = []
        self.transitions: list[Transition] = []
        self._config = config
        self._active: list[FloatArray] = []
        self._capacities: list[float] = []
        self._counts: list[list[int]] = []
        self._full_at: float | None = None

    def restart(self) -> None:
        """A new model was born: its windows start empty."""
        self.losses.clear()
        self._active.clear()
        self._full_at = None

    def loss(self, value: float) -> None:
        """Note the newest model's mean training loss of a round, unless it is no number."""
        if np.isfinite(value):
            self.losses.append(value)

    def active(self, values: FloatArray) -> None:
        """Note the activeness of the newest model's cells in a round, float64 [cells]."""
        if np.isfinite(values).all():
            self._active = [*self._active, values][-self._config.activeness_rounds :]

    def activeness(self, cells: int, only: Sequence[int] | None) -> FloatArray | None:
        """Mean activeness of the window; 1 for ``only`` and 0 elsewhere where cells are given."""
        if only is not None:
            return np.array([float(cell in only) for cell in range(cells)])
        return np.mean(self._active, axis=0) if self._active else None

    def participants(self, models: IntArray, capacity: FloatArray, n_models: int) -> None:
        """Note who took part: the model that each trained, and what it could have run."""
        self._counts = [*self._counts, np.bincount(models, minlength=n_models).tolist()][-MEMORY:]
        if len(capacity):
            window = self._config.capacity_rounds
            self._capacities = [*self._capacities, float(capacity.max())][-window:]

    def largest_capacity(self) -> float:
        """Largest capacity seen recently, in multiply-accumulates; infinite before anything was."""
        return max(self._capacities, default=float("inf"))

    def shares(self, rounds: int, n_models: int) -> FloatArray | None:
        """Share of the participants of the last ``rounds`` by model; None with fewer rounds."""
        if not rounds or len(self._counts) < rounds:
            return None
        return self.recent_shares(n_models, rounds)

    def recent_shares(self, n_models: int, rounds: int = RECENT) -> FloatArray:
        """Share of the participants of the last rounds by model, as many as there were."""
        total = np.zeros(n_models)
        for counts in self._counts[-rounds:]:
            total[: len(counts)] += counts
        return total / max(1.0, float(total.sum()))

    def note(self, transition: Transition) -> None:
        """Keep a decision; one without steps means that nothing larger fits for now."""
        self.transitions.append(transition)
        if not transition.plan.steps:
            self._full_at = self.largest_capacity()

    def exhausted(self, macs: int) -> bool:
        """Whether growing has ended until a larger device than so far is seen."""
        largest = self.largest_capacity()
        return macs >= largest or (self._full_at is not None and largest <= self._full_at)

    def verdict(self, round_id: int, models: int, macs: int) -> Verdict:
        """Whether the newest model should be transformed.

        Args:
            models: in training. macs: multiply-accumulates of the newest.
        """
        config, rounds = self._config, len(self.losses)
        slope = degree_of_convergence(self.losses, config)
        limit = threshold(self.losses, config)
        why = ""
        if not config.enabled:
            why = "growth is off"
        elif config.end_round is not None and round_id >= config.end_round:
            why = f"no model is derived from round {config.end_round} on"
        elif models >= config.max_models:
            why = f"{models} models are in training, and no more are allowed"
        elif self.exhausted(macs):
            why = "no larger model fits a device that was seen lately"
        elif slope is None:
            why = f"{rounds} of {config.delta + config.gamma} rounds since the last model"
        elif slope > limit:
            why = f"still learning: the loss falls by {slope:.5f} a round, more than {limit:.5f}"
        elif slope < -limit:
            # A loss that rises as steeply as the limit allows it to fall is no elbow.
            why = f"the loss rises by {-slope:.5f} a round: divergence, not convergence"
        told = why or f"converged: loss down {slope:.5f} a round, within {limit:.5f} of level"
        return Verdict(go=not why, why=told, slope=slope, limit=limit, rounds=rounds)

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Everything as JSON in a byte array: exact, and readable by a person."""
        record = {
            "round_id": self.round_id,
            "losses": self.losses,
            "active": [values.tolist() for values in self._active],
            "capacities": self._capacities,
            "counts": self._counts,
            "full_at": self._full_at,
            "transitions": [dataclasses.asdict(entry) for entry in self.transitions],
        }
        return {"record": np.frombuffer(json.dumps(record).encode(), dtype=np.uint8).copy()}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore :meth:`state`."""
        record = json.loads(np.asarray(state["record"], dtype=np.uint8).tobytes().decode())
        self.round_id = record["round_id"]
        self.losses = record["losses"]
        self._active = [np.array(values) for values in record["active"]]
        self._capacities = record["capacities"]
        self._counts = record["counts"]
        self._full_at = record["full_at"]
        self.transitions = [_transition(entry) for entry in record["transitions"]]


def _transition(entry: dict[str, Any]) -> Transition:
    plan = dict(entry["plan"])
    steps = tuple(Step(**step) for step in plan.pop("steps"))
    lists: dict[str, Any] = {name: tuple(plan.pop(name)) for name in ("activeness", "dropped")}
    decided = Transformation(steps=steps, **lists, **plan)
    verdict = None if entry["verdict"] is None else Verdict(**entry["verdict"])
    return Transition(entry["round_id"], entry["parent"], decided, verdict)
