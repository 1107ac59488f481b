"""LTE's LLaMA in vLLM: vLLM's own model with another FFN, tested with vLLM 0.29.

The FFN owns plain parameters: vLLM's linear layers repack their weights on a CPU and leave
empty tensors behind. Router and experts are one opaque operator, so compiled graphs see a
single node.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM

from raysys.ops import lte_ops
from raysys.training.lte.adapters import ACTIVATIONS
from raysys.training.lte.budget import LoadBudget
from raysys.training.lte.checkpoint import PERMUTATION
from raysys.training.lte.config import FORMAT_VERSION, threshold_logit
from raysys.training.lte.errors import LTECheckpointError, LTEConfigError
from raysys.training.lte.grouping import expert_count
from raysys.training.lte.inference import calibrate_layer

STATUS_EVERY_S = 0.5


class LTEMLP(nn.Module):
    """The FFN; experts are cut into contiguous ranges over tensor-parallel ranks."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        entry = config.lte
        self.rank, self.world = _parallel_place()
        experts = expert_count(config.intermediate_size, entry["expert_size"])
        if experts % self.world:
            raise LTEConfigError("tensor_parallel_size", self.world, f"a divisor of {experts}")
        self.neurons = config.intermediate_size // self.world
        self.experts = experts // self.world
        hidden, dtype = config.hidden_size, torch.get_default_dtype()
        self.w_in = _parameter(2 * self.neurons, hidden, dtype=dtype)
        self.w_out = _parameter(self.neurons, hidden, dtype=dtype)
        self.router_weight = _parameter(self.experts, hidden, dtype=torch.float32)
        self.router_bias = (
            _parameter(self.experts, dtype=torch.float32) if entry.get("router_bias") else None
        )
        self.threshold = threshold_logit(entry["threshold"])
        self.kind = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """y of x [T, D]."""
        y: Tensor = lte_ops.ffn(
            x, self.w_in, self.w_out, None, self.router_weight, self.router_bias, self.threshold,
            self.kind,
        )  # fmt: skip
        return tensor_model_parallel_all_reduce(y) if self.world > 1 else y

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Fill the parameters; vLLM hands over gate and up under one name with a shard number."""
        filled: set[str] = set()
        for name, tensor in weights:
            mine = slice(self.rank * self.neurons, (self.rank + 1) * self.neurons)
            own = slice(self.rank * self.experts, (self.rank + 1) * self.experts)
            if name == "gate_up_proj.weight":
                start = tensor.shard_id * self.neurons  # type: ignore[attr-defined]
                self.w_in[start : start + self.neurons].copy_(tensor[mine])
                filled.add("w_in")
            elif name == "down_proj.weight":
                self.w_out.copy_(tensor[:, mine].T)
                filled.add("w_out")
            elif name == "router.weight":
                self.router_weight.copy_(tensor[own])
                filled.add("router_weight")
            elif name == "router.bias" and self.router_bias is not None:
                self.router_bias.copy_(tensor[own])
                filled.add("router_bias")
            else:
                raise LTECheckpointError(
                    f"mlp.{name}", "has no place in this model", "Convert again"
                )
        return filled

    def prepare(self) -> None:
        """Measure once per machine when the dense path is faster."""
        if self.w_in.device.type == "cpu" and lte_ops.native_available():
            parts = (self.w_in, self.w_out, None, self.router_weight, self.router_bias)
            layer, _ = lte_ops.prepared(*parts, self.kind)
            calibrate_layer(layer)


class LTEDecoderLayer(LlamaDecoderLayer):  # type: ignore[misc]
    """vLLM's layer with LTE's FFN."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        vllm_config = options.get("vllm_config") or args[0]
        self.mlp = LTEMLP(options.get("config") or vllm_config.model_config.hf_config)


class LTELlamaForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """vLLM's LLaMA with LTE's FFNs, and a budget that follows the load where the model has one."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        entry = check_entry(getattr(config, "lte", None))
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=LTEDecoderLayer)
        levels = entry.get("levels")
        self.budget = LoadBudget([tuple(level) for level in levels]) if levels else None
        path = entry.get("status_file")
        self.status_file = Path(path) if path else None
        self._written = 0.0

    def forward(self, input_ids: Tensor | None, positions: Tensor, *rest: Any, **named: Any) -> Any:
        """vLLM's forward pass, with the threshold set for the step's load."""
        if self.budget is not None:
            lte_ops.set_offset(self.budget.step(int(positions.shape[-1])))
        result = super().forward(input_ids, positions, *rest, **named)
        self._report()
        return result

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load all but the permutation, which only a conversion back needs."""
        kept = ((name, t) for name, t in weights if not name.startswith(PERMUTATION))
        filled: set[str] = super().load_weights(kept)
        layers = [module for module in self.modules() if isinstance(module, LTEMLP)]
        if layers:
            layers[0].prepare()
        return filled

    def _report(self) -> None:
        """Write what the operator counted, for metrics and tests; at most twice a second."""
        if self.status_file is None or time.monotonic() - self._written < STATUS_EVERY_S:
            return
        self._written = time.monotonic()
        status = {
            "density": lte_ops.PATHS.density,
            "tokens": lte_ops.PATHS.tokens,
            "offset": lte_ops.offset(),
        }
        partial = self.status_file.with_suffix(".part")
        partial.write_text(json.dumps(status), encoding="utf-8")
        os.replace(partial, self.status_file)


def check_entry(entry: Any) -> dict[str, Any]:
    """The ``lte`` entry of a configuration.

    Raises:
        LTECheckpointError: missing, or of another version.
    """
    if not isinstance(entry, dict) or entry.get("version") != FORMAT_VERSION:
        found = entry.get("version") if isinstance(entry, dict) else None
        reason = f"lte.version is {found!r}, and this raysys reads {FORMAT_VERSION}"
        raise LTECheckpointError("config.json", reason, "Convert the model again")
    return entry


def _parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


def _parallel_place() -> tuple[int, int]:
    return get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
