"""A network as a list of cells: builds the module, lays out its parameters, counts its cost.

:class:`CellNet` is an architecture of the federated core. A plain ReLU multilayer perceptron turns
into the core's own ``Mlp`` with the same flat order, so that the batched kernel trains it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raysys.config import check, check_choice
from raysys.errors import ConfigError
from raysys.federated.core.model import FlatWeights, Mlp, ModelSpec, Task
from raysys.federated.fedtrans.attention import Attention, Patches
from raysys.federated.fedtrans.cells import (
    Array,
    Cell,
    Conv,
    Dense,
    DenseResidual,
    Depthwise,
    ResidualConv,
)
from raysys.federated.fedtrans.signal import Axis, Signal, TensorInfo

KINDS: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (Dense, DenseResidual, Conv, ResidualConv, Depthwise, Patches, Attention)
}
STEMS = (Patches,)


class _MeanTokens(nn.Module):
    def forward(self, x_BTD: Tensor) -> Tensor:
        """Mean over tokens, [B, D]."""
        return x_BTD.mean(dim=-2)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CellNet:
    """Cells, then a linear classifier; tokens are averaged and images flattened before it.

    Args:
        shape: one sample, (F,) or (C, H, W). cells: at least one. classes: outputs.
        task: "classification" or "regression".

    Raises:
        ConfigError: the cells do not fit one another.
    """

    shape: tuple[int, ...]
    cells: tuple[Cell, ...]
    classes: int = 10
    task: Task = "classification"

    def __post_init__(self) -> None:
        sound = len(self.shape) in (1, 3) and min(self.shape) >= 1
        check(self, "shape", sound, "(features,) or (channels, height, width)")
        check(self, "cells", bool(self.cells), "at least one cell")
        check(self, "classes", self.classes >= 1, "at least 1")
        check_choice(self, "task", ("classification", "regression"))
        self.signals()

    def signals(self) -> list[Signal]:
        """What enters each cell, and last what enters the classifier."""
        signal = Signal(tuple(self.shape))
        found = [signal]
        for index, cell in enumerate(self.cells):
            signal = cell.after(signal, index)
            found.append(signal)
        return found

    def build(self) -> nn.Module:
        """A freshly initialised module."""
        signals = self.signals()
        layers = [cell.module(signal) for cell, signal in zip(self.cells, signals)]
        last = signals[-1]
        bridge = _MeanTokens() if len(last.shape) == 2 else nn.Flatten()
        return nn.Sequential(*layers, bridge, nn.Linear(_into_head(last).width, self.classes))

    def tensors(self) -> list[list[TensorInfo]]:
        """Parameters of each cell, and last of the classifier."""
        signals = self.signals()
        found = [c.tensors(s, i) for i, (c, s) in enumerate(zip(self.cells, signals))]
        into = _into_head(signals[-1])
        head = TensorInfo((self.classes, into.width), (Axis(), into.axis("in")))
        return [*found, [head, TensorInfo((self.classes,), (Axis(),))]]

    def sizes(self) -> list[int]:
        """Number of parameters of each cell, and last of the classifier."""
        return [sum(tensor.size for tensor in cell) for cell in self.tensors()]

    def slices(self) -> list[slice]:
        """Where each cell lies in the flat buffer, and last the classifier."""
        ends = list(itertools.accumulate(self.sizes()))
        return [slice(start, end) for start, end in zip([0, *ends], ends)]

    @property
    def n_params(self) -> int:
        """Length of the flat buffer."""
        return sum(self.sizes())

    def macs(self) -> int:
        """Multiply-accumulates of one sample's forward pass."""
        signals = self.signals()
        inner = sum(cell.macs(signal) for cell, signal in zip(self.cells, signals))
        return inner + self.classes * _into_head(signals[-1]).width

    def spec(self) -> ModelSpec:
        """The federated core's model; a ReLU perceptron becomes its ``Mlp``."""
        if all(isinstance(cell, Dense) and cell.activation == "relu" for cell in self.cells):
            widths = [signal.flat().width for signal in self.signals()]
            return ModelSpec(architecture=Mlp(sizes=(*widths, self.classes)), task=self.task)
        return ModelSpec(architecture=self, task=self.task)

    def initial(self, seed: int) -> FlatWeights:
        """Freshly drawn parameters, float32 [P]."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            parts = [p.detach().reshape(-1) for p in self.build().parameters()]
        return torch.cat(parts).numpy().copy()

    def split(self, values: FlatWeights) -> list[list[Array]]:
        """The flat buffer as one array per parameter, cell by cell; copies.

        Raises:
            ConfigError: the buffer has another length.
        """
        if values.shape != (self.n_params,):
            raise ConfigError("weights", values.shape, f"[{self.n_params}] values of this network")
        taken = iter(np.split(values, np.cumsum(self._flat_sizes())[:-1]))
        return [
            [next(taken).reshape(tensor.shape).copy() for tensor in cell] for cell in self.tensors()
        ]

    def to_json(self) -> str:
        """The network as text; :func:`net_from_json` reads it."""
        cells = [{"kind": type(cell).__name__, **_fields(cell)} for cell in self.cells]
        whole = {"shape": self.shape, "cells": cells, "classes": self.classes, "task": self.task}
        return json.dumps(whole)

    def describe(self) -> str:
        """The cells in short, such as ``Conv 4, Dense 16``: kinds and sizes of their spaces."""
        return ", ".join(_short(cell) for cell in self.cells)

    def _flat_sizes(self) -> list[int]:
        return [tensor.size for cell in self.tensors() for tensor in cell]


def join(parts: list[list[Array]]) -> FlatWeights:
    """One flat float32 buffer of arrays per cell."""
    return np.concatenate([np.ravel(part) for part in _flat(parts)]).astype(np.float32)


def net_from_json(text: str) -> CellNet:
    """Read :meth:`CellNet.to_json`.

    Raises:
        ConfigError: the text names an unknown cell or lacks a field.
    """
    try:
        data = json.loads(text)
        cells = tuple(cell_from_dict(entry) for entry in data["cells"])
        return CellNet(
            shape=tuple(data["shape"]), cells=cells, classes=data["classes"], task=data["task"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError("network", text[:80], "a network written by to_json", repr(error)) from (
            error
        )


def cell_from_dict(entry: Mapping[str, Any]) -> Cell:
    """A cell from its kind and fields, such as ``{"kind": "Conv", "channels": 4}``.

    Raises:
        ConfigError: no such kind, or fields that it does not have.
    """
    fields = dict(entry)
    kind = fields.pop("kind", None)
    if kind not in KINDS:
        raise ConfigError("cells.kind", kind, f"one of {', '.join(KINDS)}")
    try:
        cell: Cell = KINDS[kind](**fields)
    except TypeError as error:
        known = [field.name for field in dataclasses.fields(KINDS[kind])]
        raise ConfigError(f"cells.{kind}", fields, f"the fields {known}", str(error)) from error
    return cell


def _flat(parts: list[list[Array]]) -> Iterator[Array]:
    return itertools.chain.from_iterable(parts)


def _into_head(signal: Signal) -> Signal:
    if len(signal.shape) == 2:
        return Signal((signal.width,), signal.space)
    return signal.flat()


def _short(cell: Cell) -> str:
    sizes = " x ".join(str(space.size) for _, space in sorted(cell.spaces().items()))
    return f"{type(cell).__name__} {sizes}".strip()


def _fields(cell: Any) -> dict[str, Any]:
    fields: dict[str, Any] = dataclasses.asdict(cell)
    return fields
