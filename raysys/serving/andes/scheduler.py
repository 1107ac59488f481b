"""The engine-side brain of Andes: when to plan, with which models, in which mode.

The vLLM adapter and the simulator drive this same object. It reads no clock and touches no engine:
the caller reports events and finished steps, asks :meth:`AndesScheduler.due`, hands in a snapshot
and carries out the plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from raysys.config import check_choice, check_range
from raysys.serving.andes.controller import ControllerConfig, HarmController
from raysys.serving.andes.decisions import record_decision
from raysys.serving.andes.models import LatencyModel, RestoreModel, StepTime
from raysys.serving.andes.planner import Planner, PlannerConfig
from raysys.serving.andes.snapshot import Mode, Plan, Snapshot, limit_speed

DRAIN_MEMORY_S = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class AndesConfig:
    """Everything that a serving engine may set.

    Args:
        policy: ``"andes"``, or ``"fcfs"`` to switch planning off.
        planner, controller: options of the parts.
        step_time: seed of the latency model, from ``raysys calibrate serving``.
        learn: fit the latency model while serving.
        restore_fixed_s: constant seconds per restore.
        swap_per_token_s: seconds per token from a host tier; None without one.
    """

    policy: Literal["andes", "fcfs"] = "andes"
    planner: PlannerConfig = field(default_factory=PlannerConfig)
    controller: ControllerConfig = field(default_factory=ControllerConfig)
    step_time: StepTime = field(default_factory=StepTime)
    learn: bool = True
    restore_fixed_s: float = 0.0
    swap_per_token_s: float | None = None

    def __post_init__(self) -> None:
        check_choice(self, "policy", ("andes", "fcfs"))
        check_range(self, "restore_fixed_s", 0.0)
        if self.swap_per_token_s is not None:
            check_range(self, "swap_per_token_s", 0.0)


@dataclass(slots=True)
class Counters:
    """Totals since the start, for metrics and tests."""

    steps: int = 0
    plans: int = 0
    triggered: int = 0
    pauses: int = 0
    starved: int = 0
    faults: int = 0
    busy_s: float = 0.0
    restore_s: float = 0.0
    predicted_gain: float = 0.0
    predicted_loss: float = 0.0


class AndesScheduler:
    """Plans at events and at least every ``plan_every`` steps, at most once per step.

    Args:
        config: options.
        on_error: called with the exception when a plan fails; the step then falls back to FCFS,
            because a scheduler's bug must not take the engine down.
        on_decision: called with the record of each plan that was triggered (see
            :mod:`raysys.serving.andes.decisions`); None keeps no records.
    """

    def __init__(
        self,
        config: AndesConfig | None = None,
        on_error: Callable[[Exception], None] | None = None,
        on_decision: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.config = config or AndesConfig()
        self.planner = Planner(self.config.planner)
        self.latency = LatencyModel(self.config.step_time)
        self.controller = HarmController(self.config.controller)
        self.counters = Counters()
        self._on_error = on_error
        self._on_decision = on_decision
        self._steps_since_plan = self.config.planner.plan_every
        self._event = False
        self._boosted_s = -math.inf
        self._freed_tokens = 0.0
        self._drain_tokens_per_s = 0.0

    @property
    def mode(self) -> Mode:
        return "fcfs" if self.config.policy == "fcfs" else self.controller.mode

    @property
    def restore_model(self) -> RestoreModel:
        return RestoreModel(
            per_token_s=self.latency.step_time.per_prefill_token_s,
            fixed_s=self.config.restore_fixed_s,
            swap_per_token_s=self.config.swap_per_token_s,
        )

    def on_event(self) -> None:
        """A request arrived, finished or was aborted: plan before the next step."""
        self._event = True

    def on_finish(self, context_tokens: float) -> None:
        """A running request finished or was aborted and gave its KV room back."""
        self._event = True
        self._freed_tokens += context_tokens

    def on_step(
        self,
        batch: int,
        prefill_tokens: int,
        context_tokens: int,
        seconds: float,
        restored_tokens: float = 0.0,
        *,
        steps: int = 1,
    ) -> None:
        """A step of the engine ended.

        Args:
            batch: sequences that took part.
            prefill_tokens: prompt (or recomputed) tokens computed in it.
            context_tokens: KV tokens held by the batch.
            seconds: how long it took.
            restored_tokens: those of ``prefill_tokens`` that only repeat work lost by a pause.
            steps: equal steps reported together (a simulator); ``seconds`` is their sum.
        """
        self._steps_since_plan += steps
        restore_s = min(seconds, float(self.restore_model.cost(restored_tokens)))
        counters = self.counters
        counters.steps += steps
        counters.busy_s += seconds
        counters.restore_s += restore_s
        self.controller.on_step(seconds, restore_s)
        self._update_drain(batch * steps, seconds)
        if self.config.learn:
            self.latency.observe(batch, prefill_tokens, context_tokens, seconds / steps)

    def _update_drain(self, grown_tokens: float, seconds: float) -> None:
        """Moving average of released minus grown KV tokens per second."""
        if seconds > 0.0:
            keep = math.exp(-seconds / DRAIN_MEMORY_S)
            net = (self._freed_tokens - grown_tokens) / seconds
            self._drain_tokens_per_s = keep * self._drain_tokens_per_s + (1.0 - keep) * net
            self._freed_tokens = 0.0

    def due(self) -> bool:
        """Whether to plan before the next step."""
        return self._event or self._steps_since_plan >= self.config.planner.plan_every

    def plan(self, snapshot: Snapshot) -> Plan:
        """Plan for the coming steps; never raises for a bug in planning."""
        self._event = False
        self._steps_since_plan = 0
        boost = snapshot.now_s - self._boosted_s >= self.config.planner.starved_every_s
        try:
            plan = self._make_plan(limit_speed(snapshot, self.config.planner.max_tds), boost)
        except Exception as error:
            if self._on_error is not None:
                self._on_error(error)
            self.counters.faults += 1
            self.controller.on_fault()
            plan = _arrival_order(snapshot)
        if plan.starved:
            self._boosted_s = snapshot.now_s
        counters = self.counters
        counters.plans += 1
        counters.triggered += plan.triggered
        counters.pauses += int(plan.pause.size)
        counters.starved += plan.starved
        counters.predicted_gain += plan.gain
        counters.predicted_loss += plan.loss
        return plan

    def _make_plan(self, snapshot: Snapshot, boost: bool) -> Plan:
        step_time, restore, mode = self.latency.step_time, self.restore_model, self.mode
        drain = self._drain_tokens_per_s
        plan = self.planner.plan(
            snapshot, step_time, restore, mode, boost=boost, drain_tokens_per_s=drain
        )
        if self._on_decision is not None and plan.triggered:
            self._on_decision(
                record_decision(
                    snapshot, step_time, restore, mode, plan, boost=boost, drain_tokens_per_s=drain
                )
            )
        return plan

    def on_plan_time(self, seconds: float) -> None:
        """How long the last :meth:`plan` took, measured by the caller."""
        self.controller.on_plan(seconds)


def _arrival_order(snapshot: Snapshot) -> Plan:
    waiting = np.flatnonzero(~snapshot.running)
    order = waiting[np.argsort(-snapshot.elapsed_s[waiting], kind="stable")]
    return Plan(
        admit=order.astype(np.int64),
        batch_cap=snapshot.max_batch,
        mode="fcfs",
        reason="planning failed",
    )
