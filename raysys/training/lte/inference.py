"""Run an LTE model with the kernel: the Hugging Face reference path, also for ``generate()``.

Every FFN is replaced by one that owns its weights in the kernel's layout (input rows, output
transposed), so that skipped experts are memory that nobody reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from raysys import machine
from raysys.ops import lte_ops
from raysys.ops.lte_crossover import calibrate
from raysys.ops.lte_native import NativeLayer
from raysys.training.lte.adapters import FFN
from raysys.training.lte.checkpoint import Checkpoint
from raysys.training.lte.config import threshold_logit
from raysys.training.lte.errors import LTEConfigError
from raysys.training.lte.gating import Router


class SparseFFN(nn.Module):
    """An FFN whose router and experts are one operator call.

    Attributes:
        w_in: [F, D], or [2 F, D] with the gate's rows first.
        w_out: [F, D]; row j is what neuron j writes.
        threshold: in logits; may be changed at any time.
    """

    def __init__(self, ffn: FFN, threshold: float, *, add_output_bias: bool) -> None:
        super().__init__()
        rows = torch.cat([ffn.rows(i).detach() for i in range(len(ffn.inputs))])
        biases = [b.detach().float() for b in ffn.biases()]
        router = ffn.entry.router
        assert isinstance(router, Router)
        self.w_in = nn.Parameter(rows.contiguous(), requires_grad=False)
        self.w_out = nn.Parameter(ffn.columns().detach().contiguous(), requires_grad=False)
        self.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
        self.router: Router = router
        self.kind = ffn.activation
        self.threshold = threshold
        bias = getattr(ffn.output, "bias", None) if add_output_bias else None
        self.output_bias = None if bias is None else nn.Parameter(bias.detach(), False)

    def forward(self, x: Tensor) -> Tensor:
        """y of x [..., D]; also on batches that are empty or not contiguous."""
        # Not by attribute: nn.Module looks every one up in Python, and a layer may take 200 us.
        own: dict[str, Any] = self._parameters
        router: dict[str, Any] = self.router._parameters
        y = lte_ops.ffn(
            x, own["w_in"], own["w_out"], own.get("bias"), router["weight"], router.get("bias"),
            self.threshold, self.kind,
        )  # fmt: skip
        bias = own.get("output_bias")
        return y if bias is None else y + bias

    def prepare(self) -> None:
        """Measure on this machine when the dense path is faster (kept in the cache folder)."""
        if lte_ops.native_available():
            layer, _ = lte_ops.prepared(
                self.w_in, self.w_out, self.bias, self.router.weight,
                self.router.bias, self.kind,
            )  # fmt: skip
            calibrate_layer(layer)


def calibrate_layer(layer: NativeLayer) -> None:
    """Measure a layer's crossover where the cache does not know it; later calls use it."""
    calibrate(layer, machine.cache_dir())
    lte_ops.forget(layer)


class _AddBias(nn.Module):
    """Stands where an output projection was, after the operator has done its work."""

    def __init__(self, bias: Tensor | None) -> None:
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias


def to_kernels(
    checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, *, calibrated: bool = True
) -> list[SparseFFN]:
    """Swap every FFN of a checkpoint's model for the kernel; the model is for inference afterwards.

    Args:
        checkpoint: its gates are closed.
        dtype: of weights and activations, float32 or bfloat16; routers stay float32.
        calibrated: measure the crossover to dense where it is not known yet.

    Raises:
        LTEConfigError: an architecture whose FFN is not a module of its own (OPT).
    """
    checkpoint.sparse.close()
    model = checkpoint.sparse.model.to(dtype)
    threshold = threshold_logit(checkpoint.info.threshold)
    found = []
    for gate in checkpoint.sparse.gates:
        gate.router.float()
        ffn = gate.ffn
        parent_path, _, name = ffn.path.rpartition(".")
        parent = model.get_submodule(parent_path)
        if name == "fc1":
            raise LTEConfigError("model", "OPT", "an architecture with an FFN module", "Use gates")
        split = name == "intermediate"
        sparse = SparseFFN(ffn, threshold, add_output_bias=not split)
        if split:
            parent.get_submodule("output").dense = _AddBias(getattr(ffn.output, "bias", None))
        setattr(parent, name, sparse)
        found.append(sparse)
    if calibrated and found:
        found[0].prepare()  # all layers have one shape
    return found


def set_threshold(layers: list[SparseFFN], threshold: float, offset: float = 0.0) -> None:
    """Move the threshold of every layer; ``offset`` is in logits."""
    for layer in layers:
        layer.threshold = threshold_logit(threshold) + offset
