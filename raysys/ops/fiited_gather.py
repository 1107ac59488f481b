"""Chunk-addressed rows on a device: the Triton kernels by file, and their twins in torch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from raysys.errors import CapabilityError
from raysys.ops.kernels import load_kernel

KERNEL = "fiited_gather"


def gather(pool: Tensor, refs: Tensor) -> Tensor:
    """Rows [n, k * C] of slot numbers [n, k] in a pool [slots, C] whose slot 0 is all zeros."""
    rows: Tensor = pool[refs.long()].flatten(1)
    return rows


def adagrad_step(
    pool: Tensor, refs: Tensor, grads: Tensor, acc: Tensor, utility: Tensor, lr: float, eps: float
) -> None:
    """Row-wise Adagrad over the alive chunks of distinct rows; norms are added to utilities.

    Args:
        pool: [slots, C], changed. refs: int32[n, k], 0 where a chunk is not alive.
        grads: [n, k * C]. acc: [n], changed. utility: [n, k], changed.
    """
    n, k = refs.shape
    blocks = grads.reshape(n, k, pool.shape[1])
    alive = refs > 0
    square = (blocks * blocks).sum(2)
    width = (alive.sum(1) * blocks.shape[2]).clamp(min=1)
    acc += (square * alive).sum(1) / width
    step = lr / (acc.sqrt() + eps)
    pool[refs.long()[alive]] -= (step[:, None, None] * blocks)[alive]
    utility += square.sqrt()


def device_kernels() -> Any:
    """The Triton module with the same two functions.

    Raises:
        CapabilityError: Triton cannot be imported.
    """
    try:
        return load_kernel(KERNEL)
    except ImportError as error:
        raise CapabilityError(
            "Triton kernels", str(error), "Install triton, or use the torch twins"
        ) from error
