"""Methods outside the gates: TEAL (small inputs to zero) and Wanda (weights to zero).

Liu et al., "Training-Free Activation Sparsity in LLMs" (TEAL), 2024; Sun et al., "A Simple and
Effective Pruning Approach for Large Language Models" (Wanda), ICLR 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raysys.training.lte.gating import SparseModel
from raysys.training.lte.text import Batch


def projections(sparse: SparseModel, *, ffn_only: bool) -> list[nn.Module]:
    """Linear maps of the layers: those of the FFNs, or the attention's too."""
    own = [m for gate in sparse.gates for m in (*gate.ffn.inputs, gate.ffn.output)]
    if ffn_only:
        return own
    prefix = sparse.gates[0].ffn.path.split(".0.")[0] + "."
    return [
        module
        for name, module in sparse.model.named_modules()
        if name.startswith(prefix) and isinstance(module, nn.Linear)
    ]


@torch.no_grad()
def teal(sparse: SparseModel, batches: Sequence[Batch], sparsity: float) -> list[Any]:
    """Zero the inputs of every projection below a threshold per projection.

    Args:
        batches: calibration text for the thresholds.
        sparsity: share of inputs to zero, the same for every projection.

    Returns:
        Hook handles; ``remove()`` each to restore the model.
    """
    modules = projections(sparse, ffn_only=False)
    sizes = _inputs(sparse, modules, batches)
    handles = []
    for module, parts in zip(modules, sizes):
        flat = torch.cat([part.abs().flatten() for part in parts])
        cut = flat.kthvalue(max(1, round(sparsity * flat.numel()))).values

        def zero(_module: nn.Module, args: tuple[Any, ...], cut: Tensor = cut) -> tuple[Any, ...]:
            return (torch.where(args[0].abs() > cut, args[0], 0.0), *args[1:])

        handles.append(module.register_forward_pre_hook(zero))
    return handles


@torch.no_grad()
def wanda(sparse: SparseModel, batches: Sequence[Batch], sparsity: float, pattern: int = 0) -> None:
    """Zero FFN weights with the smallest |weight| times input norm, row by row.

    Args:
        batches: calibration text for the norms.
        sparsity: share of weights per row; with ``pattern`` one half of every such many.
        pattern: 4 for 2:4, 8 for 4:8, 0 for unstructured.
    """
    modules = projections(sparse, ffn_only=True)
    for module, parts in zip(modules, _inputs(sparse, modules, batches)):
        norm = torch.cat([part.flatten(0, -2) for part in parts]).norm(dim=0)
        weight = module.weight
        assert isinstance(weight, Tensor)
        score = weight.abs() * norm
        if pattern:
            groups = score.reshape(len(weight), -1, pattern)
            worst = groups.topk(pattern // 2, dim=-1, largest=False).indices
            mask = torch.ones_like(groups).scatter_(-1, worst, 0.0).reshape(weight.shape)
        else:
            count = round(sparsity * weight.shape[1])
            worst = score.topk(count, dim=-1, largest=False).indices
            mask = torch.ones_like(score).scatter_(-1, worst, 0.0)
        weight *= mask


def _inputs(
    sparse: SparseModel, modules: Sequence[nn.Module], batches: Sequence[Batch]
) -> list[list[Tensor]]:
    seen: list[list[Tensor]] = [[] for _ in modules]
    handles = [
        module.register_forward_pre_hook(
            lambda _module, args, kept=kept: kept.append(args[0].detach().float())
        )
        for module, kept in zip(modules, seen)
    ]
    sparse.model.eval()
    sparse.set_mode("dense")
    for batch in batches:
        sparse.model(**batch.inputs)
    for handle in handles:
        handle.remove()
    return seen
