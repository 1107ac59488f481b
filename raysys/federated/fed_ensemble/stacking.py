"""A learned stack: K mixing weights and one temperature, trained on clients without moving data.

The prediction is ``softmax(sum_k v_k log p_k / T)`` with v on the simplex: a product of experts
instead of a plain mean. A round costs a client one pass over its validation samples and K + 3
numbers of traffic: the sums of loss and gradient, and its number of samples.

Dimensions: K members, N samples, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from raysys.errors import ConfigError
from raysys.federated.fed_ensemble.prediction import TINY, FloatArray, IntArray, softmax


@dataclasses.dataclass(frozen=True, slots=True)
class Stack:
    """Parameters of a stack: logits of the mixing weights [K], and log of 1 / T."""

    mixing: FloatArray
    log_sharpness: float = 0.0

    @property
    def weights(self) -> FloatArray:
        """Mixing weights [K], positive, with sum 1."""
        return softmax(self.mixing)

    def apply(self, members_KNC: FloatArray) -> FloatArray:
        """Combined probabilities [N, C] of members' probabilities [K, N, C]."""
        logs = np.log(np.maximum(members_KNC, TINY))
        return softmax(np.exp(self.log_sharpness) * np.tensordot(self.weights, logs, axes=1))


@dataclasses.dataclass(frozen=True, slots=True)
class StackGradient:
    """What a client returns: summed loss and gradient (K mixing logits, then log 1/T), and n."""

    loss: float
    gradient: FloatArray
    n: int


def stack_gradient(stack: Stack, members_KNC: FloatArray, labels: IntArray) -> StackGradient:
    """Loss and gradient of a stack on one client's validation samples, summed over them."""
    n = len(labels)
    if n == 0:
        return StackGradient(0.0, np.zeros(len(stack.mixing) + 1), 0)
    logs = np.log(np.maximum(members_KNC, TINY))
    sharpness, weights = float(np.exp(stack.log_sharpness)), stack.weights
    mixed = np.tensordot(weights, logs, axes=1)
    p = softmax(sharpness * mixed)
    picked = p[np.arange(n), labels]
    error = p.copy()
    error[np.arange(n), labels] -= 1.0
    by_member = sharpness * (error[None] * logs).sum(axis=(1, 2))
    by_mixing = weights * (by_member - weights @ by_member)
    by_sharpness = sharpness * float((error * mixed).sum())
    gradient = np.append(by_mixing, by_sharpness)
    return StackGradient(float(-np.log(np.maximum(picked, TINY)).sum()), gradient, n)


def stack_step(stack: Stack, parts: Sequence[StackGradient], lr: float = 1.0) -> Stack:
    """One server step by the mean gradient of the clients.

    Raises:
        ConfigError: no client has samples, or a gradient that is not finite.
    """
    n = sum(part.n for part in parts)
    total: npt.NDArray[np.float64] = np.sum([part.gradient for part in parts], axis=0)
    if n == 0 or not np.isfinite(total).all():
        raise ConfigError("stack gradient", n, "finite sums of at least one sample")
    move = lr * total / n
    return Stack(stack.mixing - move[:-1], float(stack.log_sharpness - move[-1]))
