"""Full sharding of a stage over workers (torch's FSDP2): weights, gradients and optimiser states.

Each decoder layer is gathered when it computes and forgotten afterwards. Gradients are summed, not
averaged, because a worker's loss is its share of the global mean. States are gathered whole, so a
sharded run may go on with another number of workers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as gathered
from torch.distributed.fsdp import FSDPModule, fully_shard

from raysys.training.lte.gating import SparseModel

WHOLE = gathered.StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(sparse: SparseModel) -> None:
    """Shard a model over all workers of the process group, layer by layer.

    The gates' hooks stay: they run while their layer is gathered.
    """
    model: Any = sparse.model
    mesh = dist.device_mesh.init_device_mesh(_device(model), (dist.get_world_size(),))
    for gate in sparse.gates:
        layer = model.get_submodule(gate.ffn.path.rpartition(".")[0])
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """The whole weights; every worker must call it, and rank 0 gets them."""
    found: Any = gathered.get_model_state_dict(model, options=WHOLE)
    return dict(found)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The whole state of an optimiser; every worker must call it, and rank 0 gets it."""
    return gathered.get_optimizer_state_dict(model, optimizer, options=WHOLE)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take the own shards out of a whole state, which every worker has."""
    gathered.set_model_state_dict(model, state["model"], options=WHOLE)
    gathered.set_optimizer_state_dict(model, optimizer, state["optimizer"], options=WHOLE)


def whole(value: Tensor) -> Tensor:
    """A tensor that may be sharded, gathered."""
    gather: Callable[[], Tensor] | None = getattr(value, "full_tensor", None)
    return value if gather is None else gather()


def _device(model: nn.Module) -> str:
    return next(model.parameters()).device.type
