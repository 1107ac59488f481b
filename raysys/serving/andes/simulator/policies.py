"""Scheduling policies for the simulator: the baselines and Andes itself.

Baselines of the Andes evaluation (arXiv 2404.16283) and common ones: first-come first-served,
static priority, round-robin, shortest job (an oracle, it knows the output lengths), earliest
deadline, least QoE first.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from raysys.errors import ConfigError
from raysys.serving.andes.gain import outlook
from raysys.serving.andes.options import shortage_tokens
from raysys.serving.andes.scheduler import AndesConfig, AndesScheduler
from raysys.serving.andes.simulator.engine import MAX_JUMP, SimEngine
from raysys.serving.andes.snapshot import FloatArray, IntArray, Snapshot


class Fcfs:
    """Order of arrival; an evicted request goes back to the head. vLLM's default."""

    name = "fcfs"

    def on_event(self) -> None:
        return

    def on_finish(self, context_tokens: float) -> None:
        self.on_event()

    def before_step(self, engine: SimEngine) -> None:
        engine.batch_cap = engine.config.max_batch

    def after_step(
        self, steps: int, batch: int, prefill: int, context: int, seconds: float, restored: float
    ) -> None:
        return

    def horizon(self, engine: SimEngine) -> int:
        return MAX_JUMP


Key = Callable[[SimEngine, IntArray], FloatArray]


class Ordered(Fcfs):
    """Sorts the queue by a key, smallest first; never pauses.

    Args:
        name: for reports.
        key: (engine, slots) -> one number per slot.
    """

    def __init__(self, name: str, key: Key) -> None:
        self.name = name
        self._key = key
        self._changed = True

    def on_event(self) -> None:
        self._changed = True

    def before_step(self, engine: SimEngine) -> None:
        super().before_step(engine)
        if self._changed and len(engine.waiting) > 1:
            slots = np.array(engine.waiting, dtype=np.int64)
            order = np.lexsort((engine.request[slots], self._key(engine, slots)))
            engine.waiting = [int(slot) for slot in slots[order]]
        self._changed = False


class Rotating(Fcfs):
    """Every ``every`` steps, the best by ``key`` get the memory and the others are paused."""

    def __init__(self, name: str, key: Key, every: int) -> None:
        self.name = name
        self._key = key
        self._every = every
        self._since = 0

    def before_step(self, engine: SimEngine) -> None:
        super().before_step(engine)
        if self._since < self._every or not engine.waiting:
            return
        self._since = 0
        slots = engine.table.live_slots()
        order = slots[np.lexsort((engine.request[slots], self._key(engine, slots)))]
        growth = engine.table.context_tokens[order] + self._every + engine.config.block_tokens
        chosen = {int(s) for s in order[np.cumsum(growth) <= engine.config.kv_tokens]}
        for slot in [s for s in engine.decoding if s not in chosen]:
            engine.pause(slot)
        waiting = set(engine.waiting)
        engine.waiting = [int(slot) for slot in order if int(slot) in waiting]

    def after_step(
        self, steps: int, batch: int, prefill: int, context: int, seconds: float, restored: float
    ) -> None:
        self._since += steps

    def horizon(self, engine: SimEngine) -> int:
        return max(1, self._every - self._since) if engine.waiting else MAX_JUMP


class Andes:
    """The real planner behind the engine's :class:`AndesScheduler`, in virtual time."""

    def __init__(self, config: AndesConfig | None = None, name: str = "andes") -> None:
        self.name = name
        self.scheduler = AndesScheduler(config, on_error=_raise)
        self.snapshots: list[Snapshot] | None = None  # set to a list to keep them

    def on_event(self) -> None:
        self.scheduler.on_event()

    def on_finish(self, context_tokens: float) -> None:
        self.scheduler.on_finish(context_tokens)

    def before_step(self, engine: SimEngine) -> None:
        if not (self.scheduler.due() and self._wanted(engine)):
            return
        slots = engine.table.live_slots()
        for slot in engine.waiting:
            if engine.repeat[slot]:
                engine.table.missing_tokens[slot] = engine.missing(slot)
        snapshot = engine.table.snapshot(
            engine.now_s,
            slots,
            capacity_tokens=engine.config.kv_tokens,
            free_tokens=engine.free_tokens,
            max_batch=engine.config.max_batch,
            step_tokens=engine.config.step_tokens,
        )
        if self.snapshots is not None:
            self.snapshots.append(snapshot)
        plan = self.scheduler.plan(snapshot)
        for index in plan.pause:
            engine.pause(int(slots[index]))
        order = np.concatenate([plan.admit, plan.hold, plan.pause])
        engine.waiting = [int(slot) for slot in slots[order]]
        engine.batch_cap = plan.batch_cap

    def after_step(
        self, steps: int, batch: int, prefill: int, context: int, seconds: float, restored: float
    ) -> None:
        self.scheduler.on_step(batch, prefill, context, seconds, restored, steps=steps)

    def horizon(self, engine: SimEngine) -> int:
        return self.scheduler.config.planner.plan_every if self._wanted(engine) else MAX_JUMP

    def _wanted(self, engine: SimEngine) -> bool:
        """Nothing waits and the running ones have room to grow: every plan would be empty."""
        reserve = shortage_tokens(self.scheduler.config.planner, engine.running)
        return bool(engine.waiting) or engine.free_tokens < reserve


def _raise(error: Exception) -> None:
    raise error


def policy_named(name: str, config: AndesConfig | None = None) -> Fcfs | Andes:
    """Build a policy by name, for command lines and reports.

    Raises:
        ConfigError: unknown name.
    """
    if name == "andes":
        return Andes(config)
    factory = _BASELINES.get(name)
    if factory is None:
        raise ConfigError("policy", name, "one of andes, " + ", ".join(_BASELINES))
    return factory()


def _by_weight(engine: SimEngine, slots: IntArray) -> FloatArray:
    return -engine.table.weight[slots]


def _by_length(engine: SimEngine, slots: IntArray) -> FloatArray:
    return engine.table.missing_tokens[slots] + engine.left[slots]


def _by_deadline(engine: SimEngine, slots: IntArray) -> FloatArray:
    table = engine.table
    due = table.submitted_s[slots] + table.ttft_s[slots] + table.tokens[slots] * table.tau_s[slots]
    result: FloatArray = due
    return result


def _by_last_service(engine: SimEngine, slots: IntArray) -> FloatArray:
    """Round-robin: those who ran come after those who wait, the longest waiting first."""
    table = engine.table
    return np.where(table.running[slots], engine.now_s, table.served_s[slots])


def _by_qoe(engine: SimEngine, slots: IntArray) -> FloatArray:
    snapshot = engine.table.snapshot(
        engine.now_s,
        slots,
        capacity_tokens=engine.config.kv_tokens,
        free_tokens=engine.free_tokens,
        max_batch=engine.config.max_batch,
        step_tokens=engine.config.step_tokens,
    )
    return outlook(snapshot, 10.0).wait


_BASELINES: dict[str, Callable[[], Fcfs]] = {
    "fcfs": Fcfs,
    "priority": lambda: Ordered("priority", _by_weight),
    "shortest_job": lambda: Ordered("shortest_job", _by_length),
    "round_robin": lambda: Rotating("round_robin", _by_last_service, 50),
    "earliest_deadline": lambda: Rotating("earliest_deadline", _by_deadline, 10),
    "least_qoe": lambda: Rotating("least_qoe", _by_qoe, 10),
}
BASELINES = tuple(_BASELINES)
