"""LTE's FFN on a GPU (Triton): route, then one of three ways to compute what is on.

    few      some tokens, each by itself: compact, gate-up over active experts, down
    grouped  a batch: per expert a list of its tokens; gate-up per (expert, 16 tokens), then down
             per 16 tokens over the experts that any of them wants
    dense    many tokens: torch's products, with the mask in the activation

Reference twin: ``raysys/ops/lte_reference.py``. Safe inside a CUDA graph: grids depend on shapes
only, nothing is read back to the host, and programs of experts that are off return at once. Sums
are float32 and in a fixed order, without atomics. Correctness is checked in interpreter mode; no
GPU has run this yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_EXPERTS = 1024
MOST_GROUPED = 1024  # tokens; a list is made in one program
SPLITS = 4
TILE = 16  # tokens of a product, the least that tensor cores take
SILU, GELU, GELU_TANH, RELU = 0, 1, 2, 3
KINDS = {"silu": SILU, "gelu": GELU, "gelu_tanh": GELU_TANH, "relu": RELU}


@triton.jit
def _act(z, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    if KIND == 0:
        return z / (1.0 + tl.exp(-z))
    elif KIND == 1:
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif KIND == 2:
        inner = 0.7978845608028654 * (z + 0.044715 * z * z * z)
        return z * (1.0 - 1.0 / (1.0 + tl.exp(2.0 * inner)))  # tanh by a sigmoid
    else:
        return tl.maximum(z, 0.0)


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
def _compact(mask, index, count, LENGTH, ROW, ITEM, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Set places of each row of a mask in front, and how many; rows lie ROW, items ITEM apart."""
    row = tl.program_id(0)
    item = tl.arange(0, BLOCK)
    on = tl.load(mask + row * ROW + item * ITEM, mask=item < LENGTH, other=0).to(tl.int32)
    place = tl.cumsum(on, 0) - 1
    tl.store(index + row * LENGTH + place, item, mask=on != 0)
    tl.store(count + row, tl.sum(on, 0))


@triton.jit
def _gate_up(
    x, w_in, bias, act, index, count, D, F, N,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, KIND: tl.constexpr, E: tl.constexpr,
    BK: tl.constexpr,
):  # type: ignore[no-untyped-def]  # fmt: skip
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
            if GATED:
                w_up = tl.load(w_in + F * D + where, mask=inside, other=0.0).to(tl.float32)
                up += tl.sum(w_up * v, axis=1)
        if HAS_BIAS:
            gate += tl.load(bias + rows)
            if GATED:
                up += tl.load(bias + F + rows)
        value = _act(gate, KIND)
        if GATED:
            value = value * up
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


@triton.jit
def _grouped_up(
    x, w_in, bias, act, tokens, counts, T, D, F,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, KIND: tl.constexpr, E: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr,
):  # type: ignore[no-untyped-def]  # fmt: skip
    e, tile = tl.program_id(0), tl.program_id(1)
    live = tl.load(counts + e)
    if tile * BT < live:
        place = tile * BT + tl.arange(0, BT)
        t = tl.load(tokens + e * T + place, mask=place < live, other=0)
        rows = e * E + tl.arange(0, E)
        gate = tl.zeros([BT, E], tl.float32)
        up = tl.zeros([BT, E], tl.float32)
        for start in range(0, D, BK):
            k = start + tl.arange(0, BK)
            inside = (place[:, None] < live) & (k[None, :] < D)
            v = tl.load(x + t[:, None] * D + k[None, :], mask=inside, other=0.0)
            where = rows[None, :] * D + k[:, None]
            w = tl.load(w_in + where, mask=(rows[None, :] >= 0) & (k[:, None] < D), other=0.0)
            gate = tl.dot(v, w, gate, input_precision="ieee")
            if GATED:
                w = tl.load(
                    w_in + F * D + where, mask=(rows[None, :] >= 0) & (k[:, None] < D), other=0.0
                )
                up = tl.dot(v, w, up, input_precision="ieee")
        if HAS_BIAS:
            gate += tl.load(bias + rows)[None, :]
            if GATED:
                up += tl.load(bias + F + rows)[None, :]
        value = _act(gate, KIND)
        if GATED:
            value = value * up
        where = t[:, None] * F + rows[None, :]
        tl.store(act + where, value.to(act.dtype.element_ty), mask=place[:, None] < live)


@triton.jit
def _grouped_down(
    act, mask, w_out, part, T, D, F, N,
    S: tl.constexpr, E: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
):  # type: ignore[no-untyped-def]  # fmt: skip
    tile, across, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    t = tile * BT + tl.arange(0, BT)
    columns = across * BN + tl.arange(0, BN)
    total = tl.zeros([BT, BN], tl.float32)
    for e in range(split, N, S):
        on = tl.load(mask + t * N + e, mask=t < T, other=0)
        if tl.sum(on.to(tl.int32), 0) > 0:
            rows = e * E + tl.arange(0, E)
            a = tl.load(act + t[:, None] * F + rows[None, :], mask=on[:, None] != 0, other=0.0)
            inside = (rows[:, None] >= 0) & (columns[None, :] < D)
            w = tl.load(w_out + rows[:, None] * D + columns[None, :], mask=inside, other=0.0)
            total = tl.dot(a, w, total, input_precision="ieee")
    where = (split * T + t[:, None]) * D + columns[None, :]
    tl.store(part + where, total, mask=(t[:, None] < T) & (columns[None, :] < D))


@triton.jit
def _activate(
    z, up, bias, mask, F, N,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, KIND: tl.constexpr, E: tl.constexpr,
    BF: tl.constexpr,
):  # type: ignore[no-untyped-def]  # fmt: skip
    t = tl.program_id(0)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    inside = f < F
    on = tl.load(mask + t * N + f // E, mask=inside, other=0)
    value = tl.load(z + t * F + f, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + f, mask=inside, other=0.0)
    value = _act(value, KIND)
    if GATED:
        second = tl.load(up + t * F + f, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            second += tl.load(bias + F + f, mask=inside, other=0.0)
        value = value * second
    tl.store(z + t * F + f, tl.where(on != 0, value, 0.0).to(z.dtype.element_ty), mask=inside)


def supports(experts: int, size: int, way: str) -> bool:
    """Whether a way ("few", "grouped" or "dense") takes experts of that number and size."""
    if way == "dense":
        return True
    power = size & (size - 1) == 0
    return power and experts <= MOST_EXPERTS and (way == "few" or size >= TILE)


def ffn(
    x: Tensor, w_in: Tensor, w_out: Tensor, bias: Tensor | None, wr: Tensor, br: Tensor | None,
    threshold: float, kind: str = "silu", way: str = "few",
) -> Tensor:  # fmt: skip
    """Router and chosen experts of an FFN.

    Args:
        x: [T, D], contiguous as all tensors.
        w_in: [2 F, D] with the gate's rows first, or [F, D]; w_out: [F, D].
        bias: float32 [rows of w_in] or None.
        wr: [N, D]; br: float32 [N] or None.
        threshold: in logits.
        kind: activation of :data:`KINDS`.
        way: "few", "grouped" or "dense"; all give the same up to rounding.

    Raises:
        ValueError: the way does not take experts of this number or size, or so many tokens.
    """
    tokens, hidden = x.shape
    neurons, experts = w_out.shape[0], wr.shape[0]
    size = neurons // experts
    if not supports(experts, size, way) or (way == "grouped" and tokens > MOST_GROUPED):
        raise ValueError(
            f"{way}: {experts} experts of {size} neurons, {tokens} tokens: need powers of two "
            f"(grouped: from {TILE} on), at most {MOST_EXPERTS} experts, {MOST_GROUPED} tokens"
        )
    mask = torch.empty(tokens, experts, dtype=torch.int8, device=x.device)
    _route[(tokens, triton.cdiv(experts, 32))](
        x, wr, wr if br is None else br, mask, threshold, hidden, experts, br is not None, 32, 256
    )
    layer = (w_in, w_out, bias, KINDS[kind], size)
    return {"few": _few, "grouped": _grouped, "dense": _dense}[way](x, mask, *layer)


def _few(
    x: Tensor, mask: Tensor, w_in: Tensor, w_out: Tensor, bias: Tensor | None, kind: int, size: int
) -> Tensor:
    (tokens, hidden), (_, experts), neurons = x.shape, mask.shape, w_out.shape[0]
    index = torch.zeros(tokens, experts, dtype=torch.int32, device=x.device)
    count = torch.empty(tokens, dtype=torch.int32, device=x.device)
    act = torch.empty(tokens, experts, size, dtype=torch.float32, device=x.device)
    part = torch.empty(tokens, SPLITS, hidden, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(experts)
    _compact[(tokens,)](mask, index, count, experts, experts, 1, block)
    _gate_up[(tokens, experts)](
        x, w_in, w_in if bias is None else bias, act, index, count, hidden, neurons, experts,
        len(w_in) != neurons, bias is not None, kind, size, 128,
    )  # fmt: skip
    _down[(tokens, triton.cdiv(hidden, 128), SPLITS)](
        act, w_out, part, index, count, hidden, experts, SPLITS, size, 128
    )
    return part.sum(1).to(x.dtype)


def _grouped(
    x: Tensor, mask: Tensor, w_in: Tensor, w_out: Tensor, bias: Tensor | None, kind: int, size: int
) -> Tensor:
    (tokens, hidden), (_, experts), neurons = x.shape, mask.shape, w_out.shape[0]
    lists = torch.empty(experts, tokens, dtype=torch.int32, device=x.device)
    counts = torch.empty(experts, dtype=torch.int32, device=x.device)
    act = torch.empty(tokens, neurons, dtype=x.dtype, device=x.device)
    part = torch.empty(SPLITS, tokens, hidden, dtype=torch.float32, device=x.device)
    tiles = triton.cdiv(tokens, TILE)
    block = triton.next_power_of_2(tokens)
    _compact[(experts,)](mask, lists, counts, tokens, 1, experts, block)
    _grouped_up[(experts, tiles)](
        x, w_in, w_in if bias is None else bias, act, lists, counts, tokens, hidden, neurons,
        len(w_in) != neurons, bias is not None, kind, size, TILE, 64,
    )  # fmt: skip
    _grouped_down[(tiles, triton.cdiv(hidden, 64), SPLITS)](
        act, mask, w_out, part, tokens, hidden, neurons, experts, SPLITS, size, TILE, 64
    )
    return part.sum(0).to(x.dtype)


def _dense(
    x: Tensor, mask: Tensor, w_in: Tensor, w_out: Tensor, bias: Tensor | None, kind: int, size: int
) -> Tensor:
    neurons = w_out.shape[0]
    gated = len(w_in) != neurons
    z = torch.nn.functional.linear(x, w_in[:neurons])
    up = torch.nn.functional.linear(x, w_in[neurons:]) if gated else z
    _activate[(len(x), triton.cdiv(neurons, 1024))](
        z, up, w_in if bias is None else bias, mask, neurons, mask.shape[1],
        gated, bias is not None, kind, size, 1024,
    )  # fmt: skip
    return z @ w_out
