"""The forward pass of a model that is cut into layer modules.

Wrapped in DistributedDataParallel, this is the module that data-parallel training calls; it holds
the user's model as its only child, so parameter names and state stay the user's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from raysys.training.kgt.plan import LayerModule, ModulePlan


class SegmentRunner(nn.Module):
    """Runs modules ``start ..`` of a traced model, with outputs captured on the way."""

    def __init__(self, model: nn.Module, plan: ModulePlan) -> None:
        super().__init__()
        self.model = model
        # A tuple keeps the segments out of the children: their parameters are the model's.
        self._segments = tuple(module.segment for module in plan.modules)
        self._loose = tuple(_loose(module) for module in plan.modules)

    def forward(
        self,
        inputs: Sequence[Tensor],
        h: Tensor | None = None,
        start: int = 0,
        capture: Sequence[int] = (),
        rows: int = 0,
    ) -> tuple[Any, list[Tensor]]:
        """Run to the model's output.

        Args:
            inputs: the model's inputs.
            h: what module ``start`` takes in; None at the model's beginning.
            capture: ascending module indices whose outputs are kept (detached, first ``rows``).

        Returns:
            The output, and the captured outputs in order.
        """
        kept: list[Tensor] = []
        value: Any = h
        for index in range(start, len(self._segments)):
            value = self._run(index, value, inputs)
            if index in capture:
                kept.append(value.detach()[:rows])
        return value, kept

    def prefix(
        self, inputs: Sequence[Tensor], upto: int, h: Tensor | None = None, start: int = 0
    ) -> Tensor:
        """Output of modules ``start .. upto - 1``, in eval mode and without gradients."""
        value: Any = h
        with torch.no_grad():
            for index in range(start, upto):
                # A dropout between two blocks may also serve a block that trains: only for now.
                training = [module for module in self._loose[index] if module.training]
                for module in training:
                    module.training = False
                value = self._run(index, value, inputs)
                for module in training:
                    module.training = True
        assert isinstance(value, Tensor)
        return value

    def _run(self, index: int, value: Any, inputs: Sequence[Tensor]) -> Any:
        segment = self._segments[index]
        assert segment is not None
        return segment(value, *inputs)


def _loose(module: LayerModule) -> tuple[nn.Module, ...]:
    """Modules without parameters that a segment calls between its units, such as dropout."""
    if not isinstance(module.segment, fx.GraphModule):
        return ()
    calls = [str(n.target) for n in module.segment.graph.nodes if n.op == "call_module"]
    loose = [name for name in dict.fromkeys(calls) if name not in module.units]
    return tuple(module.segment.get_submodule(name) for name in loose)
