"""FLOPs per token, by the paper's definition and in full.

The paper's table counts the attention projections, the active part of the FFNs and the routers, in
units of 2^30, and leaves out the head and the attention scores. :func:`total` adds both.
"""

from __future__ import annotations

import dataclasses

from raysys.training.lte.config import require

GI = 2.0**30


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes of a transformer.

    Args:
        layers, hidden, neurons: L, d and f.
        heads, kv_heads, head_size: of the attention.
        vocabulary: rows of the head.
        matrices: weight matrices of an FFN, 3 where it is gated and else 2.
        expert_size: E.
    """

    layers: int
    hidden: int
    neurons: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    matrices: int = 3
    expert_size: int = 32

    @property
    def attention_weights(self) -> int:
        """Weights of all attention projections."""
        query = self.hidden * self.heads * self.head_size
        return self.layers * 2 * (query + self.hidden * self.kv_heads * self.head_size)

    @property
    def ffn_weights(self) -> int:
        """Weights of all FFNs."""
        return self.layers * self.matrices * self.hidden * self.neurons

    @property
    def router_weights(self) -> int:
        """Weights of all routers."""
        return self.layers * (self.neurons // self.expert_size) * self.hidden


LLAMA_7B = Shape(
    layers=32, hidden=4096, neurons=11008, heads=32, kv_heads=32, head_size=128, vocabulary=32000
)


def paper(shape: Shape, sparsity: float = 0.0, *, routers: bool = True) -> float:
    """GiFLOPs (2^30) per token by the paper's definition.

    Raises:
        LTEConfigError: the sparsity is not in [0, 1].
    """
    require("sparsity", sparsity, 0.0 <= sparsity <= 1.0, "a number in [0, 1]")
    weights = shape.attention_weights + (1.0 - sparsity) * shape.ffn_weights
    return 2.0 * (weights + (shape.router_weights if routers else 0)) / GI


def total(shape: Shape, sparsity: float, context: int, *, routers: bool = True) -> float:
    """GiFLOPs (2^30) per token with the head and with attention over ``context`` tokens."""
    scores = 2.0 * 2.0 * shape.layers * shape.heads * shape.head_size * context
    head = 2.0 * shape.vocabulary * shape.hidden
    return paper(shape, sparsity, routers=routers) + (scores + head) / GI


def implied_sparsity(shape: Shape, gflops: float, *, routers: bool = True) -> float:
    """FFN sparsity at which the paper's definition gives ``gflops``."""
    return (paper(shape, 0.0, routers=routers) - gflops) * GI / (2.0 * shape.ffn_weights)


def ffn_read_share(shape: Shape) -> float:
    """Share of the weights read per decoded token that belongs to FFNs (tied or untied head)."""
    head = shape.vocabulary * shape.hidden
    return shape.ffn_weights / (shape.attention_weights + shape.ffn_weights + head)


def amdahl(ffn_share: float, sparsity: float) -> float:
    """Largest speed-up when ``ffn_share`` of the time shrinks by ``sparsity``."""
    return 1.0 / (1.0 - ffn_share * sparsity)
