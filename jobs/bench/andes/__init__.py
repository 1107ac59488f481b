"""Andes benchmark: QoE-aware scheduling against first-come first-served.

In virtual time (:mod:`.simulated`), of the planner alone (:mod:`.planning`), on the real engine
(:mod:`.engine`) and over two replicas of unequal speed (:mod:`.routing`).

The full profile's simulations are kept in the cache folder under a digest of the simulator's and
planner's source: started again, it goes on where it was interrupted.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jobs.bench.andes import engine, planning, routing, simulated
from jobs.bench.andes.cases import MACHINES
from raysys.bench import ClaimFunction

CONFIG: dict[str, Any] = {
    "machines": {name: dataclasses.asdict(step) for name, step in MACHINES.items()},
    "kv_tokens": 30_000,
    "step_tokens": 2048,
    "lengths": "prompt lognormal(ln 160, 1), output lognormal(ln 250, 0.8) up to 1,500",
    "readers": "reading classes by age, TTFT target max(1, prompt / 5000) s",
    "cheap_restore": "a tenth of recomputing",
    **engine.ENGINE_CONFIG,
    **routing.ROUTING_CONFIG,
}
CLAIMS: dict[str, ClaimFunction] = {
    **simulated.CLAIMS,
    **planning.CLAIMS,
    **engine.CLAIMS,
    **routing.CLAIMS,
}
