"""Why the cohorts are what they are: the tree with its figures, every decision, who is where."""

from __future__ import annotations

from typing import Any

import numpy as np

from raysys.federated.auxo.auxo import STRIDE, Auxo
from raysys.federated.auxo.parts import plain

HISTORY = 200


def explain(strategy: Auxo) -> dict[str, Any]:
    """JSON-ready facts of a job.

    Returns:
        ``cohorts``: one entry per node with its name, parent, birth, state, members, participants
        per round and the latest verdict with its evidence. ``events``: splits, merges, re-opened
        cohorts and blocked clients. ``models``: model id by name, of the cohorts that train.
    """
    tree, forest = strategy.tree, strategy.forest
    members = strategy.members()
    cohorts = []
    for number, node in enumerate(tree.nodes):
        report = strategy.explain_split(number)
        trains = number in members
        cohort = forest.cohorts.get(number)
        cohorts.append(
            {
                "cohort": number,
                "name": tree.name(number),
                "parent": node.parent,
                "born": node.born,
                "trains": trains,
                "merged_into": node.merged_into if node.merged_into >= 0 else None,
                "members": members.get(number),
                "participants": plain(cohort.participants) if cohort and trains else None,
                "evidence": plain(report) if report is not None else None,
            }
        )
    return {
        "kind": "auxo",
        "cohorts": cohorts,
        "events": strategy.events[-HISTORY:],
        "records": strategy.table.used,
        "wasted_updates": strategy.wasted,
        "explored": strategy.explored,
        "frozen": strategy.frozen,
        "models": {tree.name(leaf): leaf * STRIDE for leaf in tree.leaves},
    }


def where(strategy: Auxo, clients: list[int]) -> list[dict[str, Any]]:
    """Best cohort, its probability and the record of some clients."""
    ids = np.array(clients, dtype=np.int64)
    found = []
    for client, leaf in zip(clients, strategy.best_leaves(ids).tolist()):
        record = strategy.table.record(client)
        found.append(
            {
                "client": client,
                "cohort": strategy.tree.name(leaf),
                "probability": strategy.membership(client)[leaf],
                "rewards": {
                    strategy.tree.name(e.cohort): round(e.reward, 4) for e in record.entries
                },
                "blocked": bool(strategy.table.blocked(np.array([client]))[0]),
            }
        )
    return found
