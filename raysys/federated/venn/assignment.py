"""The hot path: give a batch of check-ins to jobs, in plan order, as far as credits go."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def assign(
    keys: Ints, ranking: Callable[[int], Sequence[int]], credits: MutableMapping[int, int]
) -> Ints:
    """Assign devices to jobs.

    Args:
        keys: plan key (atom) of every check-in in arrival order, int64, length N.
        ranking: jobs of a key in the order in which its devices are offered.
        credits: devices that may still be given to each job; reduced in place.

    Returns:
        The job of every check-in, int64, -1 for none. Earlier arrivals are served first.
    """
    chosen = np.full(len(keys), -1, dtype=np.int64)
    order = np.argsort(keys, kind="stable")
    distinct, first = np.unique(keys[order], return_index=True)
    bounds = [*first.tolist(), len(keys)]
    for place, key in enumerate(distinct.tolist()):
        start, end = bounds[place], bounds[place + 1]
        for job in ranking(key):
            if start == end:
                break
            count = min(credits.get(job, 0), end - start)
            if count > 0:
                chosen[order[start : start + count]] = job
                credits[job] -= count
                start += count
    return chosen
