"""Which weights train in a stage, and in which optimiser group.

``"all"`` is the paper; ``"ffn_and_router"`` freezes attention, embeddings and norms;
``"lora+router"`` trains low-rank additions to every projection of the layers, merged before saving.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from raysys.training.lte.config import StageConfig
from raysys.training.lte.errors import LTEConfigError
from raysys.training.lte.gating import SparseModel

LORA_SCALE = 2.0  # alpha / rank


class LowRank(nn.Module):
    """``x -> scale * B A x`` added to a projection's output; B starts at zero."""

    def __init__(self, inputs: int, outputs: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(inputs)
        self.a = nn.Parameter(
            torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator)
        )
        self.b = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        low: Tensor = nn.functional.linear(nn.functional.linear(x, self.a), self.b)
        return LORA_SCALE * low


def _sizes(module: nn.Module) -> tuple[int, int]:
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    return (rows, columns) if type(module).__name__ == "Conv1D" else (columns, rows)


def _add_lora(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    low_rank = module.low_rank
    assert isinstance(low_rank, LowRank)
    extra: Tensor = low_rank(args[0])
    return output + extra.to(output.dtype)


def add_lora(sparse: SparseModel, rank: int, seed: int) -> None:
    """Hang low-rank additions to every projection of the layers; a second call changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    for module in _projections(sparse):
        if not hasattr(module, "low_rank"):
            inputs, outputs = _sizes(module)
            module.low_rank = LowRank(inputs, outputs, rank, generator)
            module.register_forward_hook(_add_lora)


@torch.no_grad()
def merge_lora(sparse: SparseModel) -> None:
    """Fold the additions into the weights and remove them."""
    for module in _projections(sparse):
        low_rank = getattr(module, "low_rank", None)
        if isinstance(low_rank, LowRank):
            weight = module.weight
            assert isinstance(weight, Tensor)
            delta = LORA_SCALE * (low_rank.b @ low_rank.a)
            weight += delta.T if type(module).__name__ == "Conv1D" else delta
            del module.low_rank
            module._forward_hooks.clear()


def _projections(sparse: SparseModel) -> list[nn.Module]:
    prefix = sparse.gates[0].ffn.path.split(".0.")[0] + "."
    return [
        module
        for name, module in sparse.model.named_modules()
        if name.startswith(prefix)
        and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
    ]


def apply_scope(sparse: SparseModel, config: StageConfig) -> None:
    """Set ``requires_grad`` of every parameter for a stage; routers train only in stage 1."""
    model = sparse.model
    if config.scope == "lora+router":
        add_lora(sparse, config.lora_rank, config.seed)
    routers = {id(p) for router in sparse.routers for p in router.parameters()}
    ffn = {
        id(parameter)
        for gate in sparse.gates
        for module in (*gate.ffn.inputs, gate.ffn.output)
        for parameter in module.parameters()
    }
    for name, parameter in model.named_parameters():
        if id(parameter) in routers:
            parameter.requires_grad_(config.stage == 1)
        elif config.scope == "lora+router":
            parameter.requires_grad_(".low_rank." in name)
        else:
            parameter.requires_grad_(config.scope == "all" or id(parameter) in ffn)


def parameter_groups(sparse: SparseModel, config: StageConfig) -> list[dict[str, Any]]:
    """AdamW groups: the model's, then the routers' with a rate and decay of their own.

    Raises:
        LTEConfigError: nothing would train.
    """
    routers = {id(p) for router in sparse.routers for p in router.parameters()}
    trained = [p for p in sparse.model.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in trained if id(p) not in routers],
            "lr": config.lr,
            "weight_decay": config.weight_decay,
        },
        {
            "params": [p for p in trained if id(p) in routers],
            "lr": config.router_lr,
            "weight_decay": config.router_weight_decay,
        },
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise LTEConfigError("scope", config.scope, "a scope in which something trains")
    return groups
