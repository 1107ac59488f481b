"""Reference twin of ``kernels/batched_embedding_bag.py``: one autograd graph per client."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from raysys.ops.batched_mlp import train_each_client


def train(
    params: Sequence[Tensor],
    tokens_NL: Tensor,
    targets_N: Tensor,
    index_SCB: Tensor,
    scale_SCB: Tensor,
    active: Sequence[int],
    *,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    prox_mu: float = 0.0,
    drift: Sequence[Tensor] | None = None,
    regression: bool = False,
) -> tuple[Tensor, Tensor]:
    """Train C clients in place; arguments and result as in the kernel."""

    def forward(own: Sequence[Tensor], tokens: Tensor) -> Tensor:
        bag = functional.embedding(tokens, own[0]).mean(dim=1)
        return functional.linear(bag, own[1], own[2])

    return train_each_client(
        forward, params, tokens_NL, targets_N, index_SCB, scale_SCB, active,
        lr=lr, momentum=momentum, weight_decay=weight_decay, prox_mu=prox_mu, drift=drift,
        regression=regression,
    )  # fmt: skip
