"""LTE's FFN on a GPU for small batches (Triton): route, compact, gate-up, down.

Reference twin: ``raysys/ops/lte_reference.py``. Safe inside a CUDA graph: nothing is read back
to the host. Grids are launched for the worst case, and programs of experts that are off return
at once. Sums are float32 and in a fixed order. Correctness is checked in interpreter mode; no
GPU has run this yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_EXPERTS = 1024
SPLITS = 4


@triton.jit
def _route(
    x, wr, br, mask, threshold, D, N, HAS_BIAS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # type: ignore[no-untyped-def]
    t, tile = tl.program_id(0), tl.program_id(1)
    rows = tile * BN + tl.arange(0, BN)
    logits = tl.zeros([BN], tl.float32)
    for start in range(0, D, BK):
        k = start + tl.arange(0, BK)
        w = tl.load(
            wr + rows[:, None] * D + k[None, :],
            mask=(rows[:, None] < N) & (k[None, :] < D),
            other=0.0,
        )
        v = tl.load(x + t * D + k, mask=k < D, other=0.0)
        logits += tl.sum(w.to(tl.float32) * v.to(tl.float32)[None, :], axis=1)
    if HAS_BIAS:
        logits += tl.load(br + rows, mask=rows < N, other=0.0)
    tl.store(mask + t * N + rows, (logits > threshold).to(tl.int8), mask=rows < N)


@triton.jit
def _compact(mask, index, count, N, BN: tl.constexpr):  # type: ignore[no-untyped-def]
    t = tl.program_id(0)
    e = tl.arange(0, BN)
    on = tl.load(mask + t * N + e, mask=e < N, other=0).to(tl.int32)
    place = tl.cumsum(on, 0) - 1
    tl.store(index + t * N + place, e, mask=on != 0)
    tl.store(count + t, tl.sum(on, 0))


@triton.jit
def _gate_up(x, w_in, act, index, count, D, F, N, E: tl.constexpr, BK: tl.constexpr):  # type: ignore[no-untyped-def]
    t, slot = tl.program_id(0), tl.program_id(1)
    if slot < tl.load(count + t):
        rows = tl.load(index + t * N + slot) * E + tl.arange(0, E)
        gate = tl.zeros([E], tl.float32)
        up = tl.zeros([E], tl.float32)
        for start in range(0, D, BK):
            k = start + tl.arange(0, BK)
            v = tl.load(x + t * D + k, mask=k < D, other=0.0).to(tl.float32)[None, :]
            where = rows[:, None] * D + k[None, :]
            inside = (rows[:, None] >= 0) & (k[None, :] < D)
            gate += tl.sum(tl.load(w_in + where, mask=inside, other=0.0).to(tl.float32) * v, axis=1)
            up += tl.sum(
                tl.load(w_in + F * D + where, mask=inside, other=0.0).to(tl.float32) * v, axis=1
            )
        value = gate / (1.0 + tl.exp(-gate)) * up
        tl.store(act + (t * N + slot) * E + tl.arange(0, E), value)


@triton.jit
def _down(act, w_out, part, index, count, D, N, S: tl.constexpr, E: tl.constexpr, BN: tl.constexpr):  # type: ignore[no-untyped-def]
    t, tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    columns = tile * BN + tl.arange(0, BN)
    total = tl.zeros([BN], tl.float32)
    live = tl.load(count + t)
    for slot in range(split, live, S):
        rows = tl.load(index + t * N + slot) * E + tl.arange(0, E)
        a = tl.load(act + (t * N + slot) * E + tl.arange(0, E))
        inside = (rows[:, None] >= 0) & (columns[None, :] < D)
        w = tl.load(w_out + rows[:, None] * D + columns[None, :], mask=inside, other=0.0)
        total += tl.sum(w.to(tl.float32) * a[:, None], axis=0)
    tl.store(part + (t * S + split) * D + columns, total, mask=columns < D)


def ffn(
    x: Tensor, w_in: Tensor, w_out: Tensor, wr: Tensor, br: Tensor | None, threshold: float
) -> Tensor:
    """Router and chosen experts of a SwiGLU FFN.

    Args:
        x: [T, D]; every token is computed by itself, so this is for a few tokens.
        w_in: [2 F, D], gate rows first; w_out: [F, D].
        wr: [N, D]; br: float32 [N] or None.
        threshold: in logits.

    Raises:
        ValueError: experts are not a power of two in size, or more than 1,024.
    """
    tokens, hidden = x.shape
    neurons, experts = w_out.shape[0], wr.shape[0]
    size = neurons // experts
    if size & (size - 1) or experts > MOST_EXPERTS:
        raise ValueError(
            f"{experts} experts of {size} neurons: need powers of two, at most {MOST_EXPERTS}"
        )
    new = {"device": x.device}
    mask = torch.empty(tokens, experts, dtype=torch.int8, **new)
    index = torch.zeros(tokens, experts, dtype=torch.int32, **new)
    count = torch.empty(tokens, dtype=torch.int32, **new)
    act = torch.empty(tokens, experts, size, dtype=torch.float32, **new)
    part = torch.empty(tokens, SPLITS, hidden, dtype=torch.float32, **new)
    bias = wr if br is None else br
    _route[(tokens, triton.cdiv(experts, 32))](
        x, wr, bias, mask, threshold, hidden, experts, br is not None, 32, 256
    )
    _compact[(tokens,)](mask, index, count, experts, triton.next_power_of_2(experts))
    _gate_up[(tokens, experts)](x, w_in, act, index, count, hidden, neurons, experts, size, 128)
    _down[(tokens, triton.cdiv(hidden, 128), SPLITS)](
        act, w_out, part, index, count, hidden, experts, SPLITS, size, 128
    )
    return part.sum(1).to(x.dtype)
