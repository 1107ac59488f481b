"""Jobs of a simulation and the settings both simulators share (paper, section 5.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from raysys.config import check, check_choice, check_range


@dataclass(frozen=True, kw_only=True, slots=True)
class SimJob:
    """One federated job.

    Args:
        group: bit of its requirement in the trace's masks.
        participants: devices per round, ``D``; for an asynchronous job the concurrency.
        rounds: rounds to finish.
        arrival_s: time of registration.
        deadline_s: longest duration of an attempt (synchronous jobs).
        kind: ``sync`` rounds, or ``buffered`` asynchronous aggregation, which replaces every device
            that answers or fails at once and counts a round whenever ``buffer`` answers are in.
        buffer: answers per aggregation of a buffered job.
        work_s, comm_s: nominal seconds of computing, and of one transfer.
    """

    group: int
    participants: int
    rounds: int
    arrival_s: float = 0.0
    deadline_s: float = 600.0
    kind: Literal["sync", "buffered"] = "sync"
    buffer: int = 10
    work_s: float = 30.0
    comm_s: float = 10.0

    def __post_init__(self) -> None:
        check_range(self, "group", 0)
        check_range(self, "participants", 1)
        check_range(self, "rounds", 1)
        check_range(self, "arrival_s", 0)
        check_range(self, "deadline_s", 0, low_open=True)
        check_choice(self, "kind", ("sync", "buffered"))
        check_range(self, "buffer", 1)
        check_range(self, "work_s", 0)
        check_range(self, "comm_s", 0)
        nominal = self.work_s + 2 * self.comm_s
        check(self, "deadline_s", self.deadline_s >= nominal, f">= the nominal task, {nominal:g} s")


@dataclass(frozen=True, kw_only=True, slots=True)
class SimConfig:
    """Semantics of a run.

    Args:
        repeats: periods of the trace before the simulation stops.
        fraction: share of the demand that must answer.
        delay_s: an assignment reaches its device after a uniform delay in [0, delay_s].
        next_round_s: pause between a finished round and the next request.
        success_rule: at the deadline, ``target`` asks for ``fraction * D`` answers; ``released``
            for ``fraction * D`` assigned and ``fraction`` of the assigned answered.
        supply_window_s, supply_refresh_s: window of the rates, and how often they are taken anew.
        seed: of delays, request priorities and per-device draws.
    """

    repeats: int = 30
    fraction: float = 0.8
    delay_s: float = 2.0
    next_round_s: float = 0.1
    success_rule: Literal["target", "released"] = "released"
    supply_window_s: float = 86_400.0
    supply_refresh_s: float = 3600.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_range(self, "repeats", 1)
        check_range(self, "fraction", 0, 1, low_open=True)
        check_range(self, "delay_s", 0)
        check_range(self, "next_round_s", 0, low_open=True)
        check_choice(self, "success_rule", ("target", "released"))
        check_range(self, "supply_window_s", 0, low_open=True)
        check_range(self, "supply_refresh_s", 0, low_open=True)

    def needed(self, demand: int) -> int:
        """Answers that close a round of ``demand`` devices at once."""
        return max(math.ceil(self.fraction * demand - 1e-9), 1)

    def succeeds(self, demand: int, assigned: int, answered: int) -> bool:
        """Whether an attempt that reached its deadline counts as a success."""
        if self.success_rule == "target":
            return answered >= self.needed(demand)
        enough = assigned >= self.fraction * demand - 1e-9
        return enough and answered >= self.fraction * min(assigned, demand) - 1e-9
