"""Why the family is what it is: its members, every decision to grow, who has which model."""

from __future__ import annotations

from typing import Any

import numpy as np

from raysys.federated.core.messages import IntArray
from raysys.federated.fedtrans.journal import Transition
from raysys.federated.fedtrans.strategy import FedTrans
from raysys.federated.fedtrans.transform import Step

LISTED = 10_000


def explain(strategy: FedTrans, clients: IntArray | None = None) -> dict[str, Any]:
    """JSON-ready facts of a job that has started.

    Args:
        clients: count these only, such as the members of a cohort; None counts all.

    Returns:
        ``family``: one entry per model with parent, birth, cost, network, how it was made, clients
        that can run it and that are served by it, its share of recent participants. ``decisions``:
        when it was time to grow, on what grounds, and what was done. ``now``: why it does not grow.
        ``clients``: model by client, of the first 10,000, -1 for none.
    """
    if clients is None:
        clients = np.arange(len(strategy.manager.capacity), dtype=np.int64)
    capacity = strategy.manager.capacity[clients]
    family, macs = strategy.family(), strategy.macs()
    served = strategy.best_models(clients)
    shares = strategy.journal.recent_shares(len(family))
    members = [
        {
            "model": index,
            "parent": model.parent,
            "born": model.created,
            "retired": model.retired,
            "macs": macs[index],
            "params": model.net.n_params,
            "cells": model.net.describe(),
            "net": model.net.to_json(),
            "made": [told(step) for step in reversed(model.steps)],
            "able": int((capacity >= macs[index]).sum()),
            "served": int((served == index).sum()),
            "share": float(shares[index]),
        }
        for index, model in enumerate(family)
    ]
    return {
        "kind": "fedtrans",
        "family": members,
        "decisions": _decisions(strategy.explain_transform()),
        "now": strategy.verdict(strategy.journal.round_id).why,
        "round": strategy.journal.round_id + 1,
        "too_weak": int((served < 0).sum()),
        "clients": dict(zip(map(str, clients[:LISTED].tolist()), served[:LISTED].tolist())),
    }


def told(step: Step) -> str:
    """A step in words; cells are numbered as in the parent."""
    if step.op == "deepen":
        return f"a cell behind cell {step.cell}"
    return f"cell {step.cell} widened {step.factor:g} times"


def _decisions(transitions: list[Transition]) -> list[dict[str, Any]]:
    found, child = [], 0
    for entry in transitions:
        plan = entry.plan
        child += bool(plan.steps)
        found.append(
            {
                "round": entry.round_id,
                "parent": entry.parent,
                "child": child if plan.steps else None,
                "why": "asked for" if entry.verdict is None else entry.verdict.why,
                "slope": None if entry.verdict is None else entry.verdict.slope,
                "activeness": list(plan.activeness),
                "chosen": [step.cell for step in reversed(plan.steps)],
                "made": [told(step) for step in reversed(plan.steps)],
                "dropped": list(plan.dropped),
                "macs_before": plan.macs_before,
                "macs_after": plan.macs_after,
            }
        )
    return found
