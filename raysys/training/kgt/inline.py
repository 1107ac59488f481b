"""The knowledge-guided controller inside the training process.

Reference and criterion run every n steps between two optimizer steps: for small machines, and the
only way in which a resumed run is bit-identical to one that was never interrupted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from raysys.errors import CapabilityError
from raysys.training.kgt.config import KGTConfig
from raysys.training.kgt.controller import EventSink, FreezeController, ignore
from raysys.training.kgt.decision import Decision, Offer
from raysys.training.kgt.plan import ModulePlan
from raysys.training.kgt.plasticity import sp_loss
from raysys.training.kgt.reference import HookReference, SegmentReference
from raysys.training.kgt.savings import Savings


def load_per_core() -> float:
    """The machine's load average per core over the last minute; 0 where it cannot be read."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except OSError:
        return 0.0


def entering(offer: Offer) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The positional inputs of an offer, and what its first module takes in."""
    assert isinstance(offer.inputs, tuple)
    return offer.inputs, offer.inputs[0] if offer.start else None


def inline_control(
    config: KGTConfig,
    model: nn.Module,
    plan: ModulePlan,
    total_steps: int,
    log: EventSink = ignore,
) -> InlineControl:
    """The knowledge-guided controller for a model, with resolved options."""
    savings = Savings([module.cost for module in plan.modules])
    controller = FreezeController(config, len(plan), total_steps, savings=savings, log=log)
    return InlineControl(controller, model, plan)


class InlineControl:
    """Evaluates offers at once.

    Args:
        controller: the state machine.
        model: the model in training, which snapshots are taken from.
        load: the machine's load per core, compared with ``max_cpu_load``.
    """

    needs_gradients = False

    def __init__(
        self,
        controller: FreezeController,
        model: nn.Module,
        plan: ModulePlan,
        *,
        load: Callable[[], float] = load_per_core,
    ) -> None:
        self.controller = controller
        self.disabled_reason = ""
        self._model = model
        self._plan = plan
        self._load = load
        self._epoch = 0
        config = controller.config
        self.reference: SegmentReference | HookReference
        if plan.mode == "segments":
            self.reference = SegmentReference(config.reference, evaluations=config.window)
        else:
            units = {index: module.units[-1] for index, module in enumerate(plan.modules)}
            self.reference = HookReference(units, config.reference)

    @property
    def skipped(self) -> int:
        """Readings left out: under load, or without a finite value."""
        return self.controller.skipped

    def wants(self, step: int) -> tuple[int, ...]:
        """Modules whose outputs should be captured at this step."""
        return () if self.disabled_reason else self.controller.wants(step)

    def observe(self, step: int, loss: float, rate: float, epoch: int) -> None:
        """One optimizer step is done."""
        self._epoch = epoch
        self.controller.observe(step, loss, rate, epoch)

    def offer(self, offer: Offer) -> bool:
        """Compare with the reference, then renew it where its period is over."""
        if self.disabled_reason or not offer.grams:
            return False
        limit = self.controller.config.max_cpu_load
        if limit and self._load() > limit:
            self.controller.skipped += 1
            return False
        try:
            return self._evaluate(offer)
        except CapabilityError as error:
            # Freezing is an extra: without a reference, training goes on as it is.
            self.disabled_reason = str(error)
            self.controller.log({"event": "disabled", "step": offer.step, "reason": str(error)})
            return False

    def _evaluate(self, offer: Offer) -> bool:
        found = self._reference_grams(offer)
        if found:
            losses = {m: sp_loss(offer.grams[m], found[m]) for m in offer.grams if m in found}
            self.controller.read(offer.step, losses, offer.rate, self._epoch)
        if self.controller.reference_wanted or not found:
            self._snapshot(offer)
        return bool(found)

    def _reference_grams(self, offer: Offer) -> dict[int, Tensor]:
        wanted = sorted(offer.grams)
        if isinstance(self.reference, HookReference):
            return self.reference.grams(offer.inputs, wanted)
        inputs, enter = entering(offer)
        return self.reference.grams(inputs, enter, offer.start, wanted)

    def _snapshot(self, offer: Offer) -> None:
        self.controller.reference_refreshed()
        if isinstance(self.reference, HookReference):
            self.reference.build(self._model)
            return
        last = max(offer.grams)
        chosen = range(offer.start, last + 1)
        segments = {index: self._segment(index) for index in chosen}
        inputs, enter = entering(offer)
        self.reference.build(segments, inputs, enter)

    def _segment(self, index: int) -> nn.Module:
        segment = self._plan.modules[index].segment
        assert segment is not None
        return segment

    def gradients(self, step: int, modules: list[list[nn.Parameter]]) -> None:
        """Not used by this criterion."""

    def latest(self) -> Decision:
        """The newest decision."""
        return self.controller.decision

    def state_dict(self) -> dict[str, Any]:
        """Controller and reference."""
        return {
            "controller": self.controller.state_dict(),
            "reference": self.reference.state_dict(),
            "disabled_reason": self.disabled_reason,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a checkpoint's state.

        Raises:
            DataError: it belongs to another number of modules.
        """
        self.controller.load_state_dict(state["controller"])
        self.disabled_reason = state["disabled_reason"]
        if isinstance(self.reference, HookReference):
            self.reference.load_state_dict(state["reference"], self._model)
            return
        everything = {
            index: module.segment
            for index, module in enumerate(self._plan.modules)
            if module.segment is not None
        }
        self.reference.load_state_dict(state["reference"], everything)

    def close(self) -> None:
        """Nothing to let go of."""
