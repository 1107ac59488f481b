"""What travels between a trainer and a shard, and how many bytes that is.

Exchange ``s`` brings the gradients of step ``s - 1`` and asks for the rows of step ``s``. A push
names no rows: they are those that the same worker pulled one exchange earlier. Only alive chunks
travel; an absent chunk is one fp16 gradient norm, which is all that its utility needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from raysys.training.fiited.native import F32, U16, U32, U64

Wire = Literal["fp32", "bf16"]
Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Push:
    """Gradients of the rows of the previous pull, in its order.

    Args:
        alive: u8 lengths (shape "prefix") or u16 bitmaps per row: which chunks are in ``grads``.
        counts: uses of every row in the worker's batch, u32.
        grads: alive chunks' gradients one after the other, fp32 or bf16 (as u16).
        norms: fp16 gradient norms of the other chunks.
    """

    alive: Array
    counts: U32
    grads: Array
    norms: npt.NDArray[np.float16]

    @property
    def nbytes(self) -> int:
        return int(sum(a.nbytes for a in (self.alive, self.counts, self.grads, self.norms)))


@dataclass(frozen=True, slots=True)
class Request:
    """One worker's exchange with one shard.

    Args:
        epoch: version of the bucket map that the worker routes by.
        step: number of the exchange, from 0.
        keys, tables: virtual rows wanted for this step; empty at the end of training.
        push: gradients of step ``step - 1``; None at step 0.
        lr: learning rate of the push.
        loss_scale: what gradients are multiplied by to stand for a sum over samples.
    """

    epoch: int
    worker: int
    step: int
    keys: U64
    tables: U16
    push: Push | None
    lr: float
    loss_scale: float

    @property
    def nbytes(self) -> int:
        push = 0 if self.push is None else self.push.nbytes
        return int(self.keys.nbytes + self.tables.nbytes + push)


@dataclass(frozen=True, slots=True)
class Reply:
    """Lengths (or bitmaps) and the alive chunks of the rows that were asked for."""

    step: int
    alive: Array
    values: Array

    @property
    def nbytes(self) -> int:
        return int(self.alive.nbytes + self.values.nbytes)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A request that changed nothing.

    Args:
        reason: "behind": the shard is at exchange ``value`` and needs it and those after it again;
            "stale": it is already past the request; "epoch": the bucket map is now of version
            ``value``; "rows": a row that this shard does not own.
    """

    reason: Literal["behind", "stale", "epoch", "rows"]
    value: int


def to_wire(values: F32, wire: Wire) -> Array:
    """fp32 as it is, or bf16 as u16, rounded to nearest even."""
    if wire == "fp32":
        return values
    bits = np.ascontiguousarray(values).view(np.uint32)
    bias = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = ((bits + bias) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def from_wire(values: Array) -> F32:
    """Back to fp32."""
    if values.dtype == np.float32:
        return np.asarray(values)
    return np.asarray((values.astype(np.uint32) << np.uint32(16)).view(np.float32))


def pack_alive(alive: U16, prefix: bool) -> Array:
    """Bitmaps as u8 lengths where every bitmap is a prefix."""
    return np.bitwise_count(alive).astype(np.uint8) if prefix else alive


def unpack_alive(packed: Array) -> U16:
    """Bitmaps of lengths or bitmaps."""
    if packed.dtype == np.uint8:
        return ((np.uint32(1) << packed.astype(np.uint32)) - np.uint32(1)).astype(np.uint16)
    return np.asarray(packed)


def chunk_mask(alive: U16, k: int) -> npt.NDArray[np.bool_]:
    """Which of k chunks are alive, [n, k]."""
    return (alive[:, None] >> np.arange(k, dtype=np.uint16)) & np.uint16(1) > 0
