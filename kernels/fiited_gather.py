"""Chunk-addressed embedding rows on a GPU: gather, and the fused row-wise Adagrad step, in Triton.

Layout A of the store: a pool [slots, C] whose slot 0 is all zeros, k slot numbers per row (0 = not
alive), so a gather copies unconditionally. One program handles one row. The twin in torch is
``raysys/ops/fiited_gather.py``. Runs on the CPU under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _gather(pool, refs, out, k, C: tl.constexpr, K: tl.constexpr):
    row = tl.program_id(0)
    chunk = tl.arange(0, K)
    lane = tl.arange(0, C)
    inside = chunk < k
    slot = tl.load(refs + row * k + chunk, mask=inside, other=0)
    address = slot.to(tl.int64)[:, None] * C + lane[None, :]
    values = tl.load(pool + address)
    target = out + row * k * C + chunk[:, None] * C + lane[None, :]
    tl.store(target, values, mask=inside[:, None])


@triton.jit
def _adagrad(pool, refs, grads, acc, utility, lr, eps, k, C: tl.constexpr, K: tl.constexpr):
    row = tl.program_id(0)
    chunk = tl.arange(0, K)
    lane = tl.arange(0, C)
    inside = chunk < k
    slot = tl.load(refs + row * k + chunk, mask=inside, other=0)
    alive = (slot > 0) & inside
    offset = row * k * C + chunk[:, None] * C + lane[None, :]
    g = tl.load(grads + offset, mask=inside[:, None], other=0.0)
    square = tl.sum(g * g, axis=1)
    count = tl.sum(alive.to(tl.float32), axis=0)
    kept = tl.sum(tl.where(alive, square, 0.0), axis=0)
    total = tl.load(acc + row) + kept / tl.maximum(count * C, 1.0)
    tl.store(acc + row, total)
    step = lr / (tl.sqrt(total) + eps)
    address = slot.to(tl.int64)[:, None] * C + lane[None, :]
    weights = tl.load(pool + address)
    tl.store(pool + address, weights - step * g, mask=alive[:, None])
    old = tl.load(utility + row * k + chunk, mask=inside, other=0.0)
    tl.store(utility + row * k + chunk, old + tl.sqrt(square), mask=inside)


def gather(pool: torch.Tensor, refs: torch.Tensor) -> torch.Tensor:
    """Rows [n, k * C] of slot numbers [n, k] (int32) in a pool [slots, C]; C a power of two."""
    n, k = refs.shape
    out = torch.empty((n, k * pool.shape[1]), dtype=pool.dtype, device=pool.device)
    if n:
        _gather[(n,)](pool, refs, out, k, C=pool.shape[1], K=triton.next_power_of_2(k))
    return out


def adagrad_step(
    pool: torch.Tensor,
    refs: torch.Tensor,
    grads: torch.Tensor,
    acc: torch.Tensor,
    utility: torch.Tensor,
    lr: float,
    eps: float,
) -> None:
    """Row-wise Adagrad over alive chunks of distinct rows, and gradient norms onto utilities.

    grads [n, k * C], acc [n], utility [n, k]; pool, acc and utility change in place.
    """
    n, k = refs.shape
    if n:
        shape = {"C": pool.shape[1], "K": triton.next_power_of_2(k)}
        _adagrad[(n,)](pool, refs, grads, acc, utility, lr, eps, k, **shape)
