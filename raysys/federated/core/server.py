"""Server optimisers: how the mean update of a round moves a model.

All follow "Adaptive Federated Optimization" (Reddi et al. 2021), where D, the weighted mean of the
clients' updates, plays the part of a negative gradient. Arithmetic is float64, weights are float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from raysys.errors import ConfigError

FlatWeights = npt.NDArray[np.float32]
FloatArray = npt.NDArray[np.float64]
State = dict[str, npt.NDArray[Any]]


class ServerOptimizer(Protocol):
    """Moves weights by the mean update; keeps its own moments."""

    def step(self, weights: FlatWeights, delta: FloatArray) -> FlatWeights:
        """Return the new weights, float32 [P], given the mean update ``delta``, float64 [P]."""
        ...

    def state(self) -> State:
        """Complete state as named arrays."""
        ...

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore what :meth:`state` returned."""
        ...


class Averaging:
    """FedAvg (McMahan et al. 2017): ``w += eta * D``; eta 1 replaces the model by the mean."""

    def __init__(self, eta: float = 1.0) -> None:
        self.eta = _positive("eta", eta)

    def step(self, weights: FlatWeights, delta: FloatArray) -> FlatWeights:
        """One server step."""
        moved = delta if self.eta == 1 else self.eta * delta
        return (moved + weights).astype(np.float32)

    def state(self) -> State:
        """Nothing is kept."""
        return {}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Nothing to restore."""


class Momentum:
    """FedAvgM (Hsu et al. 2019): ``m = beta m + D; w += eta m``."""

    def __init__(self, eta: float = 1.0, beta: float = 0.9) -> None:
        self.eta = _positive("eta", eta)
        self.beta = _share("beta", beta)
        self._m: FloatArray | None = None

    def step(self, weights: FlatWeights, delta: FloatArray) -> FlatWeights:
        """One server step."""
        previous = np.zeros_like(delta) if self._m is None else self._m
        self._m = self.beta * previous + delta
        return (weights + self.eta * self._m).astype(np.float32)

    def state(self) -> State:
        """The momentum, once there is one."""
        return {} if self._m is None else {"m": self._m}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore the momentum."""
        self._m = np.array(state["m"], dtype=np.float64) if "m" in state else None


class Adam:
    """FedAdam: ``m = b1 m + (1-b1) D; v = b2 v + (1-b2) D^2; w += eta m / (sqrt(v) + tau)``.

    As in the paper there is no bias correction and v starts at 0; tau bounds the step instead.
    """

    def __init__(
        self, eta: float = 1e-2, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3
    ) -> None:
        self.eta = _positive("eta", eta)
        self.beta1 = _share("beta1", beta1)
        self.beta2 = _share("beta2", beta2)
        self.tau = _positive("tau", tau)
        self._m: FloatArray | None = None
        self._v: FloatArray | None = None

    def step(self, weights: FlatWeights, delta: FloatArray) -> FlatWeights:
        """One server step."""
        if self._m is None or self._v is None:
            self._m, self._v = np.zeros_like(delta), np.zeros_like(delta)
        self._m = self.beta1 * self._m + (1 - self.beta1) * delta
        self._v = self._second_moment(self._v, delta**2)
        return (weights + self.eta * self._m / (np.sqrt(self._v) + self.tau)).astype(np.float32)

    def state(self) -> State:
        """Both moments, once there are any."""
        return {} if self._m is None or self._v is None else {"m": self._m, "v": self._v}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore both moments."""
        self._m = np.array(state["m"], dtype=np.float64) if "m" in state else None
        self._v = np.array(state["v"], dtype=np.float64) if "v" in state else None

    def _second_moment(self, v: FloatArray, squared: FloatArray) -> FloatArray:
        return self.beta2 * v + (1 - self.beta2) * squared


class Yogi(Adam):
    """FedYogi: as FedAdam, but ``v -= (1-b2) D^2 sign(v - D^2)``."""

    def _second_moment(self, v: FloatArray, squared: FloatArray) -> FloatArray:
        moved: FloatArray = v - (1 - self.beta2) * squared * np.sign(v - squared)
        return moved


OPTIMIZERS: dict[str, type[Averaging] | type[Momentum] | type[Adam]] = {
    "fedavg": Averaging,
    "fedavgm": Momentum,
    "fedadam": Adam,
    "fedyogi": Yogi,
}


def _positive(name: str, value: float) -> float:
    if not (np.isfinite(value) and value > 0):
        raise ConfigError(f"server.{name}", value, "a finite number above 0")
    return value


def _share(name: str, value: float) -> float:
    if not 0 <= value < 1:
        raise ConfigError(f"server.{name}", value, "a number in [0, 1)")
    return value
