"""Reference twin of ``kernels/lte_ffn.cpp`` and ``kernels/lte_ffn_triton.py``: LTE's FFN in torch.

Dimensions: T tokens, D hidden, F neurons, N experts of E neurons. Weights are permuted, so that
expert i is the neurons ``[i E, (i + 1) E)``; row j of ``w_out`` is what neuron j writes
(section 3.3 of the specification of the checkpoint: the output projection transposed).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def route(x: Tensor, wr: Tensor, br: Tensor | None, threshold: float) -> tuple[Tensor, Tensor]:
    """Which tokens each expert computes.

    Args:
        x: [T, D] float32 or bfloat16.
        wr: router weights [N, D]; br: biases [N] or None.
        threshold: in logits; an expert is on strictly above it (NaN is off).

    Returns:
        offsets int32 [N + 1] and tokens int32 [nnz]; the tokens of expert i are
        ``tokens[offsets[i]:offsets[i + 1]]``, ascending.
    """
    logits = functional.linear(x.float(), wr.float(), None if br is None else br.float())
    return from_mask(logits > threshold)


def from_mask(mask_TN: Tensor) -> tuple[Tensor, Tensor]:
    """Lists of a bool mask [T, N]; see :func:`route`."""
    counts = mask_TN.sum(0, dtype=torch.int32)
    offsets = torch.zeros(mask_TN.shape[1] + 1, dtype=torch.int32, device=mask_TN.device)
    offsets[1:] = counts.cumsum(0, dtype=torch.int32)
    return offsets, mask_TN.T.nonzero()[:, 1].to(torch.int32)


def to_mask(offsets: Tensor, tokens: Tensor, rows: int) -> Tensor:
    """The bool mask [T, N] of lists; inverse of :func:`from_mask`."""
    experts = offsets.numel() - 1
    mask = torch.zeros(rows, experts, dtype=torch.bool, device=offsets.device)
    counts = (offsets[1:] - offsets[:-1]).long()
    owner = torch.repeat_interleave(torch.arange(experts, device=offsets.device), counts)
    mask[tokens.long(), owner] = True
    return mask


def activate(z: Tensor, kind: str) -> Tensor:
    """Apply an activation of :data:`ACTIVATIONS`."""
    if kind == "silu":
        return functional.silu(z)
    if kind == "relu":
        return functional.relu(z)
    return functional.gelu(z, approximate="tanh" if kind == "gelu_tanh" else "none")


def hidden(x: Tensor, w_in: Tensor, bias: Tensor | None, kind: str, *, gated: bool) -> Tensor:
    """Activated hidden vector [T, F]; the gate's rows come first in ``w_in`` where it is gated."""
    z = functional.linear(x, w_in, None if bias is None else bias.to(x.dtype))
    if not gated:
        return activate(z, kind)
    gate, up = z.chunk(2, dim=-1)
    return activate(gate, kind) * up


def masked(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    bias: Tensor | None,
    mask_TN: Tensor,
    kind: str = "silu",
    *,
    gated: bool = True,
) -> Tensor:
    """The FFN [T, D] with only the experts of ``mask_TN``; every expert computed, then masked."""
    a = hidden(x, w_in, bias, kind, gated=gated)
    size = a.shape[1] // mask_TN.shape[1]
    a_TNE = a.reshape(len(a), -1, size) * mask_TN.to(a.dtype).unsqueeze(-1)
    return a_TNE.reshape(len(a), -1) @ w_out


def ffn(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    bias: Tensor | None,
    wr: Tensor,
    br: Tensor | None,
    threshold: float,
    kind: str = "silu",
    *,
    gated: bool = True,
) -> Tensor:
    """Router and FFN together (hard mode, equation 2: scores do not scale the outputs)."""
    offsets, tokens = route(x, wr, br, threshold)
    return masked(x, w_in, w_out, bias, to_mask(offsets, tokens, len(x)), kind, gated=gated)
