"""What controllers decide and how a training loop talks to one.

A controller is anything with the methods of :class:`Control`: the knowledge-guided one, a fixed
schedule, another method's criterion, or a proxy of an actor. The training loop never waits on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn


@dataclasses.dataclass(frozen=True, slots=True)
class Decision:
    """Freeze modules ``0 .. frozen_upto - 1`` from optimizer step ``effective_step`` on.

    Args:
        version: grows by one with each decision; 0 is "nothing frozen yet".
        reason: in words, for the event log.
    """

    version: int = 0
    frozen_upto: int = 0
    effective_step: int = 0
    reason: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Offer:
    """One mini-batch to evaluate, as the training loop captured it.

    Args:
        step: optimizer step at which it was captured.
        rate: learning rate at that step.
        inputs: sub-sampled model inputs, or the output of the frozen prefix first.
        start: module that ``inputs`` enter.
        grams: module index -> row-normalised Gram matrix of its training output.
    """

    step: int
    rate: float
    inputs: tuple[Tensor, ...] | Mapping[str, Tensor]
    start: int
    grams: Mapping[int, Tensor]


class Control(Protocol):
    """The controller's side of a training loop; every method returns at once."""

    def wants(self, step: int) -> tuple[int, ...]:
        """Modules whose outputs should be captured at this step; empty for none."""

    def observe(self, step: int, loss: float, rate: float, epoch: int) -> None:
        """One optimizer step is done."""

    def offer(self, offer: Offer) -> bool:
        """Hand over a captured batch; False if it was dropped."""

    def gradients(self, step: int, modules: list[list[nn.Parameter]]) -> None:
        """Look at the gradients of each module's parameters, before they are cleared."""

    def latest(self) -> Decision:
        """The newest decision that is known here."""

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint, JSON-ready."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a checkpoint's state."""

    def close(self) -> None:
        """Let go of resources; may be called twice."""


class QuietControl:
    """Base with do-nothing methods for controllers that need only some of them."""

    needs_gradients = False

    def __init__(self) -> None:
        self.decision = Decision()

    def wants(self, step: int) -> tuple[int, ...]:
        """No module is captured."""
        del step
        return ()

    def observe(self, step: int, loss: float, rate: float, epoch: int) -> None:
        """Ignore the step."""

    def offer(self, offer: Offer) -> bool:
        """Drop the batch."""
        del offer
        return False

    def gradients(self, step: int, modules: list[list[nn.Parameter]]) -> None:
        """Ignore the gradients."""

    def latest(self) -> Decision:
        """The newest decision."""
        return self.decision

    def decide(self, upto: int, step: int, reason: str) -> None:
        """Make a new decision, unless it is the one in force."""
        if upto != self.decision.frozen_upto:
            self.decision = Decision(self.decision.version + 1, upto, step, reason)

    def state_dict(self) -> dict[str, Any]:
        """The decision and all plain public attributes."""
        return {"decision": dataclasses.astuple(self.decision)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the decision."""
        self.decision = Decision(*state["decision"])

    def close(self) -> None:
        """Nothing to let go of."""
