"""Two levels of aggregation: combiners add blocks of tasks, the coordinator adds blocks.

Sums are associative, so a block of consecutive tasks may be added anywhere, in task order. The tree
depends on the block size alone, never on how many workers or combiners there are, so the result
is the same to the bit wherever it runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from raysys.federated.core.messages import Float32Array, FloatArray, IntArray, Partial

Sums: TypeAlias = FloatArray | Float32Array


def combine_sums(presents: Sequence[IntArray], sums: Sequence[Sums]) -> FloatArray:
    """Add tasks' sums of updates, in order.

    Args:
        presents: rows of the round's models that each task trained, int64 [R].
        sums: weighted sums of updates, float64 or float32 [R, P] each.

    Returns:
        float64 [U, P], a row for each of the U different models, rising.
    """
    union = np.unique(np.concatenate(presents))
    total = np.zeros((len(union), sums[0].shape[1]))
    for present, part in zip(presents, sums):
        total[np.searchsorted(union, present)] += part
    return total


def split_sums(partial: Partial) -> tuple[Partial, Sums]:
    """A partial without its large sums, and the sums."""
    empty = np.zeros((len(partial.present), 0))
    return dataclasses.replace(partial, sum_delta=empty), partial.sum_delta


def spread_block(headers: Sequence[Partial], total: FloatArray) -> list[Partial]:
    """Partials of a block whose first task carries the sums of all; the others carry none.

    Args:
        headers: the block's partials without sums, in task order.
        total: what :func:`combine_sums` made of their sums.
    """
    presents = [header.present for header in headers]
    union = np.unique(np.concatenate(presents))
    weight, scalar = np.zeros(len(union)), np.zeros(len(union))
    for header in headers:
        rows = np.searchsorted(union, header.present)
        weight[rows] += header.sum_weight
        scalar[rows] += header.sum_scalar
    none, no_sums = np.zeros(0), np.zeros((0, total.shape[1]))
    first = dataclasses.replace(
        headers[0], present=union, sum_delta=total, sum_weight=weight, sum_scalar=scalar
    )
    rest = [
        dataclasses.replace(
            header,
            present=np.zeros(0, dtype=np.int64),
            sum_delta=no_sums,
            sum_weight=none,
            sum_scalar=none,
        )
        for header in headers[1:]
    ]
    return [first, *rest]
