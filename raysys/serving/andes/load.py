"""A scheduler's snapshot condensed to what a router and an autoscaler need of a replica."""

from __future__ import annotations

import numpy as np

from raysys.serving.andes.gain import buffer_s, outlook
from raysys.serving.andes.models import StepTime
from raysys.serving.andes.qoe import GOOD
from raysys.serving.andes.routing import ReplicaLoad
from raysys.serving.andes.snapshot import Snapshot


def replica_load(
    snapshot: Snapshot, step_time: StepTime, time_s: float | None = None
) -> ReplicaLoad:
    """The load of the engine in ``snapshot``.

    Args:
        step_time: the engine's learnt step time.
        time_s: when, on the router's clock; None takes the snapshot's.
    """
    unread = np.maximum(0.0, buffer_s(snapshot)) / snapshot.tau_s
    started = snapshot.tokens > 0
    wait = outlook(snapshot, 0.0).wait
    return ReplicaLoad(
        time_s=snapshot.now_s if time_s is None else time_s,
        capacity_tokens=snapshot.capacity_tokens,
        max_batch=snapshot.max_batch,
        step_time=step_time,
        readers=snapshot.size,
        demand_tds=float((1.0 / snapshot.tau_s).sum()),
        unread_tokens=float(np.where(started, unread, 0.0).sum()),
        context_tokens=float(snapshot.context_tokens.sum()),
        missing_tokens=float(snapshot.missing_tokens.sum()),
        below_target=int((wait < GOOD).sum()),
    )
