"""Precision of the reference model: int8 where it works and pays, else bf16 or fp32.

Paper, section 4.2: static int8 for convolutional networks, dynamic int8 for Transformers, higher
precision where int8 fails. PyTorch's own quantisation (``torch.ao``) is deprecated there and may be
removed, so it is imported only when asked for and its absence is one more reason to fall back.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raysys import machine
from raysys.errors import CapabilityError
from raysys.training.kgt.plasticity import gram, gram_error

MAX_GRAM_ERROR = 0.05
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """One candidate precision, tried."""

    precision: str
    build_s: float
    run_s: float
    error: float
    reason: str = ""


def candidates(modules: Sequence[nn.Module]) -> list[str]:
    """Precisions worth trying for these modules, cheapest to run first."""
    kinds = [type(inner) for module in modules for inner in module.modules()]
    convolutional = any(issubclass(kind, _CONVOLUTIONS) for kind in kinds)
    linear = any(issubclass(kind, nn.Linear) for kind in kinds)
    found = ["fx_int8"] if convolutional else ["dynamic_int8"] if linear else []
    return [*found, *(["bf16"] if _fast_bf16() else []), "fp32"]


def fallback() -> str:
    """Precision that always works: bf16 where the processor computes in it, else fp32."""
    return "bf16" if _fast_bf16() else "fp32"


def _fast_bf16() -> bool:
    return bool({"amx_bf16", "avx512_bf16"} & machine.cpu_flags())


def convert(module: nn.Module, precision: str, example: Sequence[Any]) -> nn.Module:
    """A frozen copy of a module in eval mode and at this precision.

    Args:
        example: calibration inputs of the module; used by static int8 only.

    Raises:
        CapabilityError: this torch or this model cannot be quantised so.
    """
    twin = copy.deepcopy(module).eval()
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    if precision == "fp32":
        return twin
    if precision == "bf16":
        return _Lowered(twin.to(torch.bfloat16))
    if not any(True for _ in module.parameters()):
        return twin
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecation notes of torch.ao
            build = _static_int8 if precision == "fx_int8" else _dynamic_int8
            return build(twin, example)
    except Exception as error:  # torch.ao raises many types for unsupported operations
        first = str(error).strip().split("\n")[0][:160]
        raise CapabilityError(
            f"a reference model in {precision}", f"{type(error).__name__}: {first}",
            "Use reference=fp32",
        ) from error  # fmt: skip


def _static_int8(module: nn.Module, example: Sequence[Any]) -> nn.Module:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    # Never qnnpack: it is the ARM engine and ten times slower on x86.
    mapping = get_default_qconfig_mapping("x86")
    prepared = prepare_fx(module, mapping, tuple(example))
    with torch.no_grad():
        prepared(*example)
    converted: nn.Module = convert_fx(prepared)
    return converted


def _dynamic_int8(module: nn.Module, example: Sequence[Any]) -> nn.Module:
    from torch.ao.quantization import quantize_dynamic

    del example
    quantise: Any = quantize_dynamic
    converted: nn.Module = quantise(module, {nn.Linear}, dtype=torch.qint8)
    return converted


class _Lowered(nn.Module):
    """A bfloat16 module that takes and returns float32."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        lowered = [_cast(value, torch.bfloat16) for value in args]
        return _cast(self.module(*lowered), torch.float32)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype) for item in value)
    return value


def choose(
    modules: Sequence[nn.Module],
    inputs: Sequence[Tensor],
    enter: Tensor | None,
    evaluations: int,
    clock: Callable[[], float] = time.process_time,
) -> tuple[str, list[Trial]]:
    """Pick the precision that costs least over one reference period and agrees with fp32.

    Args:
        modules: consecutive segments ``(h, *inputs)``.
        enter: what the first segment takes in.
        evaluations: passes between two rebuilds (W).

    Returns:
        The precision, and every trial. Agreement means a relative Frobenius error of the Gram
        matrix below 5 %.
    """
    trials: list[Trial] = []
    exact: Tensor | None = None
    for precision in reversed(candidates(modules)):
        try:
            trial, out = _try(modules, inputs, enter, precision, clock)
        except CapabilityError as error:
            trials.append(Trial(precision, 0.0, 0.0, float("inf"), error.reason))
            continue
        exact = out if precision == "fp32" else exact
        assert exact is not None
        trials.append(dataclasses.replace(trial, error=gram_error(out, exact)))
    fitting = [trial for trial in trials if trial.error < MAX_GRAM_ERROR]
    best = min(fitting, key=lambda trial: trial.build_s + evaluations * trial.run_s)
    return best.precision, trials


def _try(
    modules: Sequence[nn.Module],
    inputs: Sequence[Tensor],
    enter: Tensor | None,
    precision: str,
    clock: Callable[[], float],
) -> tuple[Trial, Tensor]:
    start = clock()
    built = convert_chain(modules, precision, inputs, enter)
    build_s = clock() - start
    spent = []
    out: tuple[Tensor, ...] = ()
    with torch.no_grad():
        for _ in range(3):
            start = clock()
            out = built(enter, *inputs)
            spent.append(clock() - start)
    return Trial(precision, build_s, statistics.median(spent), 0.0), gram(out[-1])


class Chain(nn.Module):
    """Consecutive segments as one module: ``(h, *inputs)`` to the tuple of all their outputs."""

    def __init__(self, segments: Sequence[nn.Module]) -> None:
        super().__init__()
        self.segments = nn.ModuleList(segments)

    def forward(self, h: Tensor | None, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run all segments."""
        outputs: list[Tensor] = []
        value: Any = h
        for segment in self.segments:
            value = segment(value, *inputs)
            outputs.append(value)
        return tuple(outputs)


class _OneInput(nn.Module):
    """A chain as a function of what it really takes in, which static quantisation can trace."""

    def __init__(self, chain: Chain, begins: bool) -> None:
        super().__init__()
        self.chain = chain
        self.begins = begins

    def forward(self, value: Tensor) -> Any:
        return self.chain(None, value) if self.begins else self.chain(value, value)


class _Quantised(nn.Module):
    def __init__(self, module: nn.Module, begins: bool) -> None:
        super().__init__()
        self.module = module
        self.begins = begins

    def forward(self, h: Tensor | None, *inputs: Tensor) -> Any:
        return self.module(inputs[0] if self.begins else h)


def convert_chain(
    modules: Sequence[nn.Module], precision: str, inputs: Sequence[Tensor], enter: Tensor | None
) -> nn.Module:
    """Convert consecutive segments into one module ``(h, *inputs)`` with all their outputs.

    Converted as a whole, so that activations stay int8 from one segment to the next.

    Raises:
        CapabilityError: this torch or this model cannot be quantised so.
    """
    chain = Chain(modules)
    if precision != "fx_int8":
        return convert(chain, precision, ())
    if len(inputs) != 1:
        raise CapabilityError(
            "a static int8 reference", f"the model takes {len(inputs)} inputs", "Use fp32"
        )
    begins = enter is None
    example = inputs[0] if enter is None else enter
    return _Quantised(convert(_OneInput(chain, begins), precision, (example,)), begins)
