"""The combiner: adds the sums of a block of tasks near the workers, so that one sum travels on.

A plain class; the coordinator applies ``ray.remote``. The sums never pass through the coordinator:
it holds references, and a combiner fetches them from the workers' object stores.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from actors.federated.pool import Call, WorkerPool
from raysys.federated.core.combining import combine_sums, spread_block
from raysys.federated.core.messages import FloatArray, IntArray, Partial

BLOCK_TASKS = 8


class CombinerActor:
    """Adds sums."""

    def combine(self, presents: Sequence[IntArray], *sums: FloatArray) -> FloatArray:
        """See :func:`raysys.federated.core.combining.combine_sums`."""
        return combine_sums(presents, sums)

    def health(self) -> dict[str, Any]:
        """Process id."""
        return {"pid": os.getpid()}

    def close(self) -> None:
        """Nothing to release."""


def combined(
    answers: dict[Any, tuple[Partial, Any]], pool: WorkerPool
) -> Iterator[tuple[Any, Partial]]:
    """Combine a round's answers block by block.

    Args:
        answers: header and reference to the sums, by (group, task number).
        pool: combiner actors.

    Yields:
        (group, partial) of every task, ready to fold.
    """
    groups: dict[Any, list[int]] = {}
    for group, task in sorted(answers):
        groups.setdefault(group, []).append(task)
    blocks = {
        (group, tasks[at]): tasks[at : at + BLOCK_TASKS]
        for group, tasks in groups.items()
        for at in range(0, len(tasks), BLOCK_TASKS)
    }
    calls = []
    for (group, first), tasks in blocks.items():
        headers = [answers[group, task][0] for task in tasks]
        sums = [answers[group, task][1] for task in tasks]
        presents = [header.present for header in headers]
        calls.append(Call((group, first), "combine", (presents, *sums)))
    for (group, first), total in pool.run(calls):
        headers = [answers[group, task][0] for task in blocks[group, first]]
        for partial in spread_block(headers, total):
            yield group, partial
