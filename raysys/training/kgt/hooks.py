"""Models that cannot be traced: blocks probed and watched by forward hooks.

The model runs as it is. Frozen blocks lose their backward pass, since nothing before them asks for
gradients; their forward cannot be skipped, so there is no activation cache in this mode.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True, slots=True)
class Probe:
    """One block as a trial forward saw it."""

    units: tuple[str, ...]
    forward_s: float
    shape: tuple[int, ...] | None


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restore buffers, gradients, modes and the random generator after trial passes."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    random_state = torch.random.get_rng_state()
    for parameter, _ in grads:
        parameter.grad = None
    try:
        yield
    finally:
        torch.random.set_rng_state(random_state)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for parameter, grad in grads:
            parameter.grad = grad


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor in an output that may be a tuple, list, dict or dataclass-like mapping."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return next((found for item in value if (found := first_tensor(item)) is not None), None)
    return None


def call(model: nn.Module, inputs: Sequence[Tensor] | Mapping[str, Tensor]) -> Any:
    """Call a model with positional or keyword inputs."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def probe(
    model: nn.Module,
    example: Sequence[Tensor] | Mapping[str, Tensor],
    units: Sequence[str],
    clock: Callable[[], float],
) -> tuple[list[Probe], list[str]]:
    """Run once and note order, time and shape of every unit.

    Units that run twice, or that share parameters, are merged with all that lies between.
    """
    seen: list[tuple[str, float, tuple[int, ...] | None]] = []
    started: dict[str, float] = {}
    handles = []
    for name in units:
        unit = model.get_submodule(name)

        def before(module: nn.Module, args: Any, name: str = name) -> None:
            started[name] = clock()

        def after(module: nn.Module, args: Any, out: Any, name: str = name) -> None:
            tensor = first_tensor(out)
            shape = tuple(tensor.shape[1:]) if tensor is not None else None
            seen.append((name, clock() - started[name], shape))

        handles += [unit.register_forward_pre_hook(before), unit.register_forward_hook(after)]
    try:
        with untouched(model), torch.no_grad():
            call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return _merge(model, seen)


def _merge(
    model: nn.Module, seen: Sequence[tuple[str, float, tuple[int, ...] | None]]
) -> tuple[list[Probe], list[str]]:
    owner: dict[int, list[int]] = {}
    at: dict[str, list[int]] = {}
    for index, (name, _, _) in enumerate(seen):
        at.setdefault(name, []).append(index)
        for parameter in model.get_submodule(name).parameters():
            owner.setdefault(id(parameter), []).append(index)
    spans = [(min(found), max(found)) for found in [*at.values(), *owner.values()]]
    notes = [f"{name} runs {len(found)} times" for name, found in at.items() if len(found) > 1]
    if any(low < high for low, high in spans) and not notes:
        notes.append("blocks that share weights were merged")
    probes: list[Probe] = []
    names: list[str] = []
    spent = 0.0
    for index, (name, seconds, shape) in enumerate(seen):
        spent += seconds
        if name not in names:
            names.append(name)
        if not any(low <= index < high for low, high in spans):
            probes.append(Probe(tuple(names), spent, shape))
            names, spent = [], 0.0
    return probes, notes


def parameters_of(model: nn.Module, units: Sequence[str]) -> tuple[nn.Parameter, ...]:
    """Parameters of these units, each once."""
    found: dict[int, nn.Parameter] = {}
    for name in units:
        for parameter in model.get_submodule(name).parameters():
            found.setdefault(id(parameter), parameter)
    return tuple(found.values())


class _Reached(Exception):  # noqa: N818 - a signal, not an error
    """Ends a forward pass once the last wanted output is there."""


class Capture:
    """Context that keeps the outputs of some units during a forward pass.

    Args:
        units: name of the unit whose output stands for each module index.
        rows: only the first rows are kept.
        stop: end the pass after the last wanted unit (reference model); suppresses its exception.
    """

    def __init__(
        self, model: nn.Module, units: Mapping[int, str], rows: int, *, stop: bool = False
    ) -> None:
        self.outputs: dict[int, Tensor] = {}
        self._model = model
        self._units = units
        self._rows = rows
        self._stop = stop
        self._handles: list[Any] = []

    def __enter__(self) -> Capture:
        for index, name in self._units.items():
            unit = self._model.get_submodule(name)
            self._handles.append(unit.register_forward_hook(self._keeper(index)))
        return self

    def _keeper(self, index: int) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, args: Any, out: Any) -> None:
            tensor = first_tensor(out)
            if tensor is not None:
                self.outputs[index] = tensor.detach()[: self._rows]
            if self._stop and len(self.outputs) == len(self._units):
                raise _Reached

        return keep

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> bool:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        return kind is _Reached
