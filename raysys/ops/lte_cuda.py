"""Which Triton path LTE's FFN takes on a GPU, and the call.

The choice is by batch and shape alone: reading the density would make the host wait for the GPU and
break CUDA graphs. Density decides inside the kernels, whose programs for experts that are off
return at once. The switches come from the arithmetic of memory and products, not from a
measurement; set :data:`SWITCH` after one.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Any, Literal

from torch import Tensor

from raysys.ops import lte_reference as reference
from raysys.ops.kernels import load_kernel

Way = Literal["few", "grouped", "dense", "torch"]
SWITCH = {"few": 4, "grouped": 32}  # most tokens of a path; more go to the next one
_LOG = logging.getLogger(__name__)


@functools.cache
def triton_available() -> bool:
    """Whether Triton is installed; says so once where it is not."""
    found = importlib.util.find_spec("triton") is not None
    if not found:
        _LOG.warning("LTE computes densely on this GPU: triton is not installed")
    return found


def way_of(tokens: int, experts: int, size: int) -> Way:
    """The path of a batch.

    Args:
        tokens: in the batch.
        experts, size: how many experts a layer has, of how many neurons.
    """
    if not triton_available():
        return "torch"
    supports = load_kernel("lte_ffn_triton").supports
    if tokens <= SWITCH["few"] and supports(experts, size, "few"):
        return "few"
    if tokens <= SWITCH["grouped"] and supports(experts, size, "grouped"):
        return "grouped"
    return "dense"


def ffn(
    x: Tensor, w_in: Tensor, w_out: Tensor, bias: Tensor | None, wr: Tensor, br: Tensor | None,
    threshold: float, kind: str,
) -> tuple[Tensor, Way]:  # fmt: skip
    """y [T, D] of x [T, D], and the path that computed it; see :func:`raysys.ops.lte_ops.ffn`."""
    experts = wr.shape[0]
    way = way_of(len(x), experts, w_out.shape[0] // experts)
    if way == "torch":
        gated = w_in.shape[0] == 2 * w_out.shape[0]
        y = reference.ffn(x, w_in, w_out, bias, wr, br, threshold, kind, gated=gated)
        return y, way
    kernel: Any = load_kernel("lte_ffn_triton")
    parts = [None if t is None else t.contiguous() for t in (x, w_in, w_out, bias, wr, br)]
    return kernel.ffn(*parts, threshold, kind, way), way
