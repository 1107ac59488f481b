"""The exact-K knapsack: choose at most B requests within the KV room, with the most value.

Andes (arXiv 2404.16283), the solver: greedy by value per context length, O(N log N), with dynamic
programming as the exact reference. The paper stops at the first request that does not fit; we
skip it and go on, which is never worse.

Shapes: N items.
"""

from __future__ import annotations

import numpy as np

from raysys.serving.andes.snapshot import BoolArray, FloatArray, IntArray


def greedy_order(value: FloatArray, weight: FloatArray, *, per_weight: bool = True) -> IntArray:
    """Items by descending value per weight (or by value); ties keep the given order.

    Args:
        value: (N,) value of each item.
        weight: (N,) positive KV tokens.
    """
    key = value / weight if per_weight else value
    order: IntArray = np.argsort(-key, kind="stable").astype(np.int64)
    return order


def pack(
    order: IntArray,
    value: FloatArray,
    weight: FloatArray,
    batch: int,
    room: float,
    *,
    skip_misfits: bool = True,
) -> IntArray:
    """Take items in ``order`` while they fit; items without positive value are never taken.

    Vectorised: each round takes the longest prefix that fits and then drops every remaining item
    larger than the room left, so the number of rounds is small.

    Returns:
        The chosen items, in ``order``; possibly empty.
    """
    left = order[value[order] > 0.0]
    taken: list[IntArray] = []
    count = batch
    while left.size and count > 0 and room > 0.0:
        total = np.cumsum(weight[left])
        fits = min(int(np.searchsorted(total, room, side="right")), count)
        if fits:
            taken.append(left[:fits])
            room -= float(total[fits - 1])
            count -= fits
        if not skip_misfits:
            break
        left = left[fits:]
        left = left[weight[left] <= room]
    return np.concatenate(taken) if taken else np.empty(0, dtype=np.int64)


def greedy_pack(
    value: FloatArray,
    weight: FloatArray,
    batch: int,
    room: float,
    *,
    per_weight: bool = True,
    skip_misfits: bool = True,
) -> IntArray:
    """The best greedy packing: by value per weight and, where the count binds, two more orders.

    Value per weight wastes places on small items when there are fewer places than memory, so value
    alone and value per square root of weight are tried as well.
    """
    order = greedy_order(value, weight, per_weight=per_weight)
    best = pack(order, value, weight, batch, room, skip_misfits=skip_misfits)
    if not per_weight or best.size < batch or best.size == int((value > 0.0).sum()):
        return best
    for key in (value, value / np.sqrt(weight)):
        order = np.argsort(-key, kind="stable")
        other = pack(order, value, weight, batch, room, skip_misfits=skip_misfits)
        if value[other].sum() > value[best].sum():
            best = other
    return best


def exact_pack(value: FloatArray, weight: IntArray, batch: int, room: int) -> BoolArray:
    """Dynamic programming over items, count and memory: O(N B M) time and memory.

    For tests and ablations. Maximises the total value of at most ``batch`` items.

    Args:
        value: (N,) value; items with value <= 0 are never chosen.
        weight: (N,) non-negative integers (tokens, or blocks to keep the table small).
        room: total weight allowed; negative means that nothing fits.

    Returns:
        (N,) bool, the chosen items.
    """
    chosen = np.zeros(value.size, dtype=np.bool_)
    if room < 0 or batch <= 0:
        return chosen
    best = np.zeros((batch + 1, room + 1))
    takes: list[tuple[int, BoolArray]] = []
    for item in np.flatnonzero((value > 0.0) & (weight <= room)):
        size = int(weight[item])
        candidate = np.full_like(best, -1.0)
        candidate[1:, size:] = best[:-1, : room + 1 - size] + value[item]
        take = candidate > best + 1e-12
        best = np.where(take, candidate, best)
        takes.append((int(item), take))
    count, memory = batch, room
    for item, take in reversed(takes):
        if take[count, memory]:
            chosen[item] = True
            count -= 1
            memory -= int(weight[item])
    return chosen
