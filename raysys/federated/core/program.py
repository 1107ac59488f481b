"""Clients as programs of your own: whatever trains a model given its weights, one client at a time.

The ladder's fourth way, for code that cannot be batched: another framework, a ``NumPyClient`` of
Flower, a client with state on disk. The rest of the engine stays the same: late binding, screening,
partial sums, replaced workers. A program that raises is a failed client, not a failed round.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from raysys.errors import ConfigError
from raysys.federated.core.messages import IntArray
from raysys.federated.core.model import ModelSpec, layout_of

Arrays = list[npt.NDArray[np.float32]]
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Fitted:
    """What a program gives back: weights like those it got, samples used, losses if it has any."""

    weights: Sequence[npt.NDArray[Any]]
    n_samples: int
    loss_first: float = 0.0
    loss_last: float = 0.0


class ClientProgram(Protocol):
    """Trains one client."""

    def fit(self, client: int, weights: Arrays, round_id: int) -> Fitted:
        """Train ``client`` from ``weights``, arrays of the declared shapes that it may change."""
        ...


class _Shapes(nn.Module):
    """Parameters without a forward pass: only the layout matters."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        self.parts = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in shapes])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FromProgram:
    """A client program as an architecture.

    Args:
        factory: ``"package.module:function"``, importable where workers run; called once per worker
            with ``arguments``, returns a :class:`ClientProgram`.
        shapes: shapes of the weights, in the program's order.
    """

    factory: str
    shapes: tuple[tuple[int, ...], ...]
    arguments: tuple[tuple[str, Any], ...] = ()

    def build(self) -> nn.Module:
        """A module that has the parameters and no forward pass."""
        return _Shapes(self.shapes)

    def program(self) -> ClientProgram:
        """Import the factory and call it.

        Raises:
            ConfigError: it cannot be imported, or returns something without ``fit``.
        """
        name, _, attribute = self.factory.partition(":")
        try:
            maker = getattr(importlib.import_module(name), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(
                "program.factory", self.factory, "an importable package.module:function", str(error)
            ) from error
        program: ClientProgram = maker(**dict(self.arguments))
        if not callable(getattr(program, "fit", None)):
            raise ConfigError("program.factory", type(program).__name__, "an object with fit()")
        return program


@dataclasses.dataclass(frozen=True, slots=True)
class Ran:
    """Deltas float32 [C, P], losses [C], samples [C], and which clients failed, bool [C]."""

    delta: Tensor
    loss_first: Tensor
    loss_last: Tensor
    n_samples: IntArray
    failed: npt.NDArray[np.bool_]


def run_programs(
    spec: ModelSpec, weights_KP: Tensor, rows: IntArray, clients: IntArray, round_id: int
) -> Ran:
    """Run the program of each client, one after another."""
    layout, program = layout_of(spec), _cached_program(spec.architecture)
    delta = torch.zeros(len(clients), layout.n_params)
    losses = np.zeros((2, len(clients)), dtype=np.float32)
    n_samples = np.zeros(len(clients), dtype=np.int64)
    failed = np.zeros(len(clients), dtype=bool)
    for place, (client, row) in enumerate(zip(clients.tolist(), rows.tolist())):
        start = weights_KP[row : row + 1]
        given = [part[0].numpy().copy() for part in layout.split(start)]
        try:
            fitted = program.fit(client, given, round_id)
            delta[place] = _flat(fitted.weights, layout.shapes) - start[0]
        except Exception as error:  # foreign code: its failure is its client's, as on a device
            _log.warning("client %d failed in round %d: %r", client, round_id, error)
            failed[place] = True
            continue
        n_samples[place] = fitted.n_samples
        losses[:, place] = fitted.loss_first, fitted.loss_last
    first, last = torch.from_numpy(losses)
    return Ran(delta, first, last, n_samples, failed | (n_samples < 1))


@functools.lru_cache(maxsize=4)
def _cached_program(architecture: FromProgram) -> ClientProgram:
    return architecture.program()


def _flat(arrays: Sequence[npt.NDArray[Any]], shapes: Sequence[tuple[int, ...]]) -> Tensor:
    found = tuple(tuple(np.shape(part)) for part in arrays)
    if found != tuple(shapes):
        raise ConfigError("weights", found, f"shapes {tuple(shapes)}")
    parts = [np.asarray(part, dtype=np.float32).reshape(-1) for part in arrays]
    return torch.from_numpy(np.concatenate(parts))
