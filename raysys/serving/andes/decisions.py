"""The decision log: every plan that was triggered, with all it was made from, so that it can be
made again elsewhere: to find out why somebody was paused, or what another option would have done.

One JSON object a plan. Floats are written exactly, so a replay gives the same plan to the bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from raysys.serving.andes.models import RestoreModel, StepTime
from raysys.serving.andes.options import PlannerConfig
from raysys.serving.andes.planner import Planner
from raysys.serving.andes.snapshot import Mode, Plan, Snapshot

_SNAPSHOT_FIELDS = tuple(field.name for field in dataclasses.fields(Snapshot))
_KINDS = {"running": np.bool_, "pausable": np.bool_, "preemptions": np.int64}


def record_decision(
    snapshot: Snapshot,
    step_time: StepTime,
    restore: RestoreModel,
    mode: Mode,
    plan: Plan,
    *,
    boost: bool,
    drain_tokens_per_s: float,
) -> dict[str, Any]:
    """A plan and its inputs, JSON-ready; the arguments are those of :meth:`Planner.plan`."""
    columns = {name: _plain(getattr(snapshot, name)) for name in _SNAPSHOT_FIELDS}
    inputs = {
        "snapshot": columns,
        "step_time": dataclasses.asdict(step_time),
        "restore": dataclasses.asdict(restore),
        "mode": mode,
        "boost": boost,
        "drain_tokens_per_s": drain_tokens_per_s,
    }
    return {"digest": _digest(snapshot), **plan_to_dict(plan), "inputs": inputs}


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """A plan, JSON-ready."""
    return {field.name: _plain(getattr(plan, field.name)) for field in dataclasses.fields(plan)}


def replay_decision(record: Mapping[str, Any], config: PlannerConfig | None = None) -> Plan:
    """Make a logged plan again, with the same or with other options.

    Raises:
        KeyError: the record is not one of :func:`record_decision`.
    """
    inputs = record["inputs"]
    columns = {
        name: np.array(value, dtype=_KINDS.get(name, np.float64))
        if isinstance(value, list)
        else value
        for name, value in inputs["snapshot"].items()
    }
    return Planner(config).plan(
        Snapshot(**columns),
        StepTime(**inputs["step_time"]),
        RestoreModel(**inputs["restore"]),
        inputs["mode"],
        boost=inputs["boost"],
        drain_tokens_per_s=inputs["drain_tokens_per_s"],
    )


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _digest(snapshot: Snapshot) -> str:
    """Names a snapshot's content, to find equal situations."""
    digest = hashlib.sha256()
    for name in _SNAPSHOT_FIELDS:
        digest.update(np.asarray(getattr(snapshot, name)).tobytes())
    return digest.hexdigest()[:16]
