"""Single updates, or means of small groups of clients, for what a plain sum cannot give.

Medians, trimmed means and server-side ensembles need more than a sum. A group of one is a client's
own update; larger groups are the "median of partial means" of Chen, Su and Xu (2017), which costs
less traffic and shows the server no single client.

Dimensions: k clients of a task, U groups, P parameters.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from raysys.federated.core.messages import Float32Array, FloatArray, IntArray


class GroupedUpdates:
    """Weighted means of updates over groups of clients of one model, in the task's order.

    Args:
        rows: row of the stacked weights of each client, int64 [k]. size: clients of a group.
        n_params: P.
    """

    def __init__(self, rows: IntArray, size: int, n_params: int) -> None:
        self._slot = np.arange(len(rows))
        owners: list[int] = rows.tolist() if size == 1 else []
        for row in np.unique(rows).tolist() if size > 1 else ():
            members = np.flatnonzero(rows == row)
            self._slot[members] = len(owners) + np.arange(len(members)) // size
            owners += [row] * -(-len(members) // size)
        self.row: IntArray = np.array(owners, dtype=np.int64)
        self.weight: FloatArray = np.zeros(len(owners))
        self._sum: FloatArray = np.zeros((len(owners), n_params))

    def add(self, places: IntArray, delta_cP: Float32Array, weight: FloatArray) -> None:
        """Add the updates of some clients; those with weight 0 were screened out."""
        slot = self._slot[places]
        np.add.at(self._sum, slot, delta_cP * weight[:, None])
        np.add.at(self.weight, slot, weight)

    def means(self) -> Float32Array:
        """Mean update of each group, float32 [U, P]; zeros where nothing was kept."""
        scale = np.where(self.weight > 0, self.weight, 1.0)
        means: npt.NDArray[np.float32] = (self._sum / scale[:, None]).astype(np.float32)
        return means
