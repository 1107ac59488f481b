"""Options of the planner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from raysys.config import check_choice, check_range

Objective = Literal["mean", "maxmin", "perfect", "tail"]
OBJECTIVES: tuple[Objective, ...] = ("mean", "maxmin", "perfect", "tail")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannerConfig:
    """Options of the planner; the defaults are the measured ones of ``docs/andes.md``.

    Args:
        objective: mean QoE, max-min QoE, number of perfect requests, or a tail target.
        horizon_s: look-ahead of the gain.
        watermark: KV occupancy that triggers planning.
        plan_every: most steps between two plans while something waits.
        growth_tokens: KV kept free per request when admitting, so that running answers can grow.
        running_bonus: factor on a running request's value, against churn.
        max_preemptions: pauses per request; 0 never pauses.
        gate: protect readers with little unread text from being paused.
        guard_s: smallest unread text that makes a request a victim.
        guard_restore_factor: the gate is at least this many of the request's restore times.
        guard_room_factor: the gate is at least this many times what restoring the whole KV room
            takes. Readers drain in about the gate's time, so at most one part in this factor of
            the engine's time can go into restores.
        refiner: accept a swap only if it gains more than its restore time costs everybody.
        charge_waiting: count that cost for waiting requests too.
        per_length: divide the value by the context length.
        skip_misfits: go on after a request that does not fit.
        solver: ``"greedy"``, or ``"exact"`` (dynamic programming; slow, for studies).
        batch_candidates: batch sizes tried in the window.
        max_wait_s: starvation guard: a reader without text, unserved for so long, goes first.
        starved_every_s: at most one such boost per so many seconds; without a limit a long overload
            turns every order into order of arrival.
        max_tds: nobody is planned with a higher reading speed than this (tokens/s), whatever is
            asked for. The fastest of the paper's classes takes 7.7. Without a limit a client that
            claims 1,000 would always be behind, never be paused, and live at others' cost.
        tail_target: q* of the tail objective.
        frozen_wait: for studies: Qwait is the current QoE, so that waiting costs nothing.
    """

    objective: Objective = "mean"
    horizon_s: float = 50.0
    watermark: float = 0.90
    plan_every: int = 10
    growth_tokens: float = 18.0
    running_bonus: float = 1.1
    max_preemptions: int = 3
    gate: bool = True
    guard_s: float = 2.0
    guard_restore_factor: float = 3.0
    guard_room_factor: float = 12.0
    refiner: bool = True
    charge_waiting: bool = True
    per_length: bool = True
    skip_misfits: bool = True
    solver: Literal["greedy", "exact"] = "greedy"
    batch_candidates: int = 8
    max_wait_s: float = 60.0
    starved_every_s: float = 20.0
    max_tds: float = 12.0
    tail_target: float = 0.95
    frozen_wait: bool = False

    def __post_init__(self) -> None:
        check_choice(self, "objective", OBJECTIVES)
        check_choice(self, "solver", ("greedy", "exact"))
        check_range(self, "horizon_s", 0.0, 3600.0, low_open=True)
        check_range(self, "watermark", 0.0, 1.0, low_open=True)
        check_range(self, "plan_every", 1)
        check_range(self, "growth_tokens", 0.0)
        check_range(self, "running_bonus", 1.0)
        check_range(self, "max_preemptions", 0)
        check_range(self, "guard_s", 0.0)
        check_range(self, "guard_restore_factor", 0.0)
        check_range(self, "guard_room_factor", 0.0)
        check_range(self, "batch_candidates", 1, 64)
        check_range(self, "max_wait_s", 0.0, low_open=True)
        check_range(self, "starved_every_s", 0.0)
        check_range(self, "max_tds", 0.0, 1000.0, low_open=True)
        check_range(self, "tail_target", 0.0, 1.0)


def shortage_tokens(config: PlannerConfig, running: int) -> float:
    """Free KV room below which the engine might evict somebody before the next plan."""
    return (config.plan_every + 1.0) * running
