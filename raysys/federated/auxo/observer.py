"""What a round says about the clients of one cohort: rewards, strikes, labels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from raysys.federated.auxo.affinity import MOST_PLACEMENTS, AffinityTable
from raysys.federated.auxo.cohort import Cohort, View
from raysys.federated.auxo.config import AuxoConfig
from raysys.federated.auxo.rewards import Feedback, feedback, updated_rewards
from raysys.federated.auxo.tree import CohortTree
from raysys.federated.core.aggregation import ClientTable

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
FAR_QUANTILE, FAR_NEEDED = 0.99, 64
REJECTED_SHARE, REOPEN_AFTER = 0.35, 20
STRANGE = -0.5


class Observer:
    """Turns the table of a round into affinity.

    Args:
        log: takes the round, the kind of an event, and its facts.
    """

    def __init__(
        self,
        config: AuxoConfig,
        tree: CohortTree,
        table: AffinityTable,
        log: Callable[..., None],
    ) -> None:
        self._config = config
        self._tree = tree
        self._table = table
        self._log = log

    def observe(
        self,
        round_id: int,
        cohort: Cohort,
        table: ClientTable,
        rows: IntArray,
        models: IntArray,
        trial: BoolArray,
    ) -> None:
        """Take one cohort's participants.

        Args:
            rows: their rows in ``table``. models: the model that each trained. trial: who is on
                probation.
        """
        clients = table.clients[rows]
        several = len(self._tree.leaves) > 1
        member = self._table.rewards(clients)[:, cohort.number] > 0 if several else ~trial
        found, views = self._compare(table, rows, models, member)
        self._table.mark_tried(clients, cohort.number, round_id)
        if several:
            before = self._table.rewards(clients)
            after = updated_rewards(
                before, cohort.number, found.reward, self._tree, self._config.gamma,
                self._config.rules,
            )  # fmt: skip
            self._table.set_rewards(clients, after, round_id)
            self._table.settle(clients[found.reward > 0])
            # Sent here by an anchor and far from all members: it is of no part that we know.
            strangers = clients[found.reward < STRANGE]
            self._table.exhaust(strangers, MOST_PLACEMENTS)
            self._watch(round_id, cohort, found, member)
            self._judge(round_id, cohort, clients, found, member)
        cohort.observe(round_id, views, self._table)

    def _compare(
        self, table: ClientTable, rows: IntArray, models: IntArray, member: BoolArray
    ) -> tuple[Feedback, list[View]]:
        """Feedback of each participant among those of its own model."""
        assert table.sketch is not None
        found = Feedback(np.zeros(len(rows)), np.zeros(len(rows)))
        views = []
        for model in np.unique(models).tolist():
            own = np.flatnonzero(models == model)
            part = rows[own]
            sketch = table.sketch[part].astype(np.float64)
            half = None if table.sketch_half is None else table.sketch_half[part].astype(np.float64)
            views.append(View(model, table.clients[part], sketch, half))
            loss = table.loss_first[part].astype(np.float64)
            result = feedback(sketch, loss, member[own], self._config.rules)
            found.reward[own], found.distance[own] = result.reward, result.distance
        return found, views

    def _judge(
        self, round_id: int, cohort: Cohort, clients: IntArray, found: Feedback, member: BoolArray
    ) -> None:
        """Strike members whose updates fall far outside; three of four put them on the list.

        Whoever claims a cohort by its record and does not fit it, again and again, is forging.
        """
        ratios = np.array(cohort.ratios)
        cohort.ratios.extend(found.distance[member].tolist())
        if not self._config.block or len(ratios) < FAR_NEEDED or not member.any():
            return
        far = found.distance[member] > max(1.0, float(np.quantile(ratios, FAR_QUANTILE)))
        for client in self._table.strike(clients[member], far, round_id).tolist():
            self._log(round_id, "blocked", client=client, cohort=cohort.number)

    def _watch(self, round_id: int, cohort: Cohort, found: Feedback, member: BoolArray) -> None:
        """Re-open a cohort to exploration when too many of its members no longer fit."""
        if member.any():
            cohort.note_rejections(float((found.reward[member] <= 0).mean()))
        rejected = cohort.rejections
        if rejected > REJECTED_SHARE and round_id - cohort.opened > REOPEN_AFTER:
            cohort.opened = round_id
            self._log(round_id, "reopened", cohort=cohort.number, rejected=rejected)
