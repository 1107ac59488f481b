"""The reference model: a snapshot of the model in training, evaluated beside it.

Only the modules up to the wanted one run, and the frozen prefix is skipped: its output, which the
training step has at hand, is where the reference starts (paper, section 4.2; prefix reuse is ours).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raysys.errors import CapabilityError
from raysys.training.kgt import quantise
from raysys.training.kgt.hooks import Capture, call
from raysys.training.kgt.plasticity import gram


class SegmentReference:
    """Reference of a traced model.

    Args:
        precision: one of ``auto``, ``fx_int8``, ``dynamic_int8``, ``bf16``, ``fp32``. ``auto`` is
            decided at the first build; a precision that fails falls back, and says so in ``notes``.
        evaluations: readings between two rebuilds, which ``auto`` spreads the build cost over.
    """

    def __init__(
        self,
        precision: str = "auto",
        *,
        evaluations: int = 10,
        clock: Callable[[], float] = time.process_time,
    ) -> None:
        self.precision = precision
        self.notes: list[str] = []
        self.builds = 0
        self._evaluations = evaluations
        self._clock = clock
        self._exact: dict[int, nn.Module] = {}
        self._chain: nn.Module | None = None
        self._calibration: tuple[int, tuple[Tensor, ...], Tensor | None] | None = None

    @property
    def ready(self) -> bool:
        """Whether a snapshot is loaded."""
        return bool(self._exact)

    def build(
        self,
        segments: Mapping[int, nn.Module],
        inputs: Sequence[Tensor],
        enter: Tensor | None,
    ) -> None:
        """Take a snapshot of these segments (consecutive, keyed by module index).

        Args:
            inputs: model inputs, calibration for static int8.
            enter: what the first of the segments takes in.
        """
        first = min(segments)
        if self.precision == "fp32" and self._exact.keys() >= segments.keys():
            for index, segment in segments.items():
                self._exact[index].load_state_dict(segment.state_dict())
            self._exact = {index: self._exact[index] for index in sorted(segments)}
        else:
            self._exact = {index: _frozen(segment) for index, segment in segments.items()}
            self._calibration = (first, tuple(inputs), enter)
            self._convert()
        self.builds += 1

    def _convert(self) -> None:
        assert self._calibration is not None
        _, inputs, enter = self._calibration
        order = sorted(self._exact)
        chain = [self._exact[index] for index in order]
        if self.precision == "auto":
            self.precision, trials = quantise.choose(
                chain, inputs, enter, self._evaluations, self._clock
            )
            self.notes += [f"{t.precision}: {t.reason}" for t in trials if t.reason]
        if self.precision == "fp32":
            self._chain = None
            return
        try:
            self._chain = quantise.convert_chain(chain, self.precision, inputs, enter)
        except CapabilityError as error:
            self.notes.append(f"{error} Falls back to {quantise.fallback()}.")
            self.precision = quantise.fallback()
            self._chain = quantise.convert_chain(chain, self.precision, inputs, enter)

    def grams(
        self, inputs: Sequence[Tensor], enter: Tensor | None, start: int, wanted: Sequence[int]
    ) -> dict[int, Tensor]:
        """Gram matrices (B, B) of the wanted modules' outputs; empty if they are not covered."""
        if not wanted or any(index not in self._exact for index in range(start, max(wanted) + 1)):
            return {}
        first = min(self._exact)
        with torch.no_grad():
            if self._chain is None:
                return self._exact_grams(inputs, enter, start, wanted)
            if start != first:
                return {}
            outputs = self._chain(enter, *inputs)
        return {index: gram(outputs[index - first]) for index in wanted}

    def _exact_grams(
        self, inputs: Sequence[Tensor], enter: Tensor | None, start: int, wanted: Sequence[int]
    ) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}
        value: Any = enter
        for index in range(start, max(wanted) + 1):
            value = self._exact[index](value, *inputs)
            if index in wanted:
                found[index] = gram(value)
        return found

    def state_dict(self) -> dict[str, Any]:
        """The exact weights, the calibration batch and the chosen precision."""
        return {
            "precision": self.precision,
            "exact": {index: segment.state_dict() for index, segment in self._exact.items()},
            "calibration": self._calibration,
        }

    def load_state_dict(self, state: Mapping[str, Any], segments: Mapping[int, nn.Module]) -> None:
        """Rebuild the same reference; ``segments`` give the structure."""
        self.precision = state["precision"]
        self._exact = {}
        for index, weights in state["exact"].items():
            self._exact[index] = _frozen(segments[index])
            self._exact[index].load_state_dict(weights)
        self._calibration = state["calibration"]
        if self._exact:
            self._convert()


class HookReference:
    """Reference of a model that cannot be traced: a whole copy, stopped after the last module.

    Args:
        units: name of the unit whose output stands for each module index.
    """

    def __init__(self, units: Mapping[int, str], precision: str = "fp32") -> None:
        self.precision = "dynamic_int8" if precision == "dynamic_int8" else "fp32"
        self.notes: list[str] = []
        self._units = units
        self._twin: nn.Module | None = None
        self._exact: dict[str, Any] | None = None

    @property
    def ready(self) -> bool:
        """Whether a snapshot is loaded."""
        return self._twin is not None

    def build(self, model: nn.Module) -> None:
        """Take a snapshot of the whole model.

        Raises:
            CapabilityError: the model cannot be copied.
        """
        try:
            self._twin = quantise.convert(model, self.precision, ())
            self._exact = copy.deepcopy(model.state_dict())
        except CapabilityError as error:
            if self.precision == "fp32":
                raise
            self.notes.append(f"{error} Falls back to fp32.")
            self.precision = "fp32"
            self.build(model)
        except Exception as error:  # deepcopy raises whatever the model's attributes raise
            raise CapabilityError(
                "a reference model", f"the model cannot be copied ({error})",
                "Remove what cannot be deep-copied from the model",
            ) from error  # fmt: skip

    def grams(
        self, inputs: Sequence[Tensor] | Mapping[str, Tensor], wanted: Sequence[int]
    ) -> dict[int, Tensor]:
        """Gram matrices of the wanted modules' outputs."""
        if self._twin is None or not wanted:
            return {}
        units = {index: self._units[index] for index in wanted}
        rows = next(iter(inputs.values() if isinstance(inputs, Mapping) else inputs)).shape[0]
        capture = Capture(self._twin, units, rows, stop=True)
        with torch.no_grad(), capture:
            call(self._twin, inputs)
        return {index: gram(value) for index, value in capture.outputs.items()}

    def state_dict(self) -> dict[str, Any]:
        """Precision and weights of the snapshot."""
        return {"precision": self.precision, "exact": self._exact}

    def load_state_dict(self, state: Mapping[str, Any], model: nn.Module) -> None:
        """Rebuild the same reference; ``model`` gives the structure and is left as it is."""
        self.precision = state["precision"]
        if state["exact"] is not None:
            twin = copy.deepcopy(model)
            twin.load_state_dict(state["exact"])
            self.build(twin)


def _frozen(segment: nn.Module) -> nn.Module:
    try:
        twin = copy.deepcopy(segment).eval()
    except Exception as error:  # deepcopy raises whatever the model's attributes raise
        raise CapabilityError(
            "a reference model", f"a block cannot be copied ({error})",
            "Remove what cannot be deep-copied from the model",
        ) from error  # fmt: skip
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    return twin
