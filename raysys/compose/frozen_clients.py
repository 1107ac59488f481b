"""KGT inside federated averaging: clients neither train nor send layers that have converged.

The server compares the aggregated model with itself some rounds ago on samples that it holds (KGT
section 4.2, the similarity-preserving loss) and decides by KGT's criterion (algorithm 1). A frozen
prefix is a function of a client's samples that no longer changes, so a client computes it once,
keeps the activations, and from then on trains and sends only the layers behind it.

The paper's reference is a snapshot of the one training model; ours is the mean model of
``lag`` rounds ago. Nothing is unfrozen.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import time

import numpy as np
from torch import Tensor

from raysys.config import check_range
from raysys.errors import ConfigError
from raysys.federated.core.engine import FederatedJob
from raysys.federated.core.evaluation import outputs
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.model import FlatWeights, Mlp, ModelSpec, Weights
from raysys.federated.core.population import Population
from raysys.federated.core.runner import run_round
from raysys.federated.core.strategy import RoundReport
from raysys.federated.core.training import Samples
from raysys.training.kgt.criterion import ModuleTrack, Reading
from raysys.training.kgt.plasticity import gram, sp_loss


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FreezeConfig:
    """When the server looks and how it decides.

    Args:
        every: rounds between readings. lag: readings between the model and its reference.
        window: W of the criterion, in readings. coef: its factor of the threshold.
    """

    every: int = 2
    lag: int = 3
    window: int = 4
    coef: float = 0.2

    def __post_init__(self) -> None:
        check_range(self, "every", 1)
        check_range(self, "lag", 1)
        check_range(self, "window", 2)
        check_range(self, "coef", 0, low_open=True)


class FrozenPrefixJob:
    """Federated averaging of an MLP whose first layers can be frozen between rounds.

    Args:
        sizes: widths of the whole model. samples: what the clients hold; never changed.
    """

    def __init__(
        self, sizes: tuple[int, ...], local: LocalConfig, clients_per_round: int,
        population: Population, samples: Samples, seed: int,
    ) -> None:  # fmt: skip
        self.sizes, self.local, self.clients_per_round = sizes, local, clients_per_round
        self.population, self.seed = population, seed
        self.frozen = 0
        self.client_cpu_s = 0.0
        self._prefix = np.empty(0, dtype=np.float32)
        self._samples = samples
        self._line = FedAvg(ModelSpec(architecture=Mlp(sizes=sizes)), local, clients_per_round)
        self._job = FederatedJob(self._line, population, seed)

    @property
    def layers(self) -> int:
        """Linear layers of the whole model."""
        return len(self.sizes) - 1

    @property
    def weights(self) -> FlatWeights:
        """Weights of the whole model, float32 [P]."""
        return np.concatenate([self._prefix, self._line.weights(0)])

    def round(self) -> RoundReport:
        """One round; adds its CPU time, in which the server's averaging is contained."""
        before = time.process_time()
        report = run_round(self._job, self._samples)
        self.client_cpu_s += time.process_time() - before
        return report

    def freeze(self, upto: int) -> None:
        """Freeze the first ``upto`` layers; every client's one pass through them is charged.

        Raises:
            ConfigError: fewer than are frozen, or nothing left to train.
        """
        if not self.frozen <= upto < self.layers:
            raise ConfigError("upto", upto, f"from {self.frozen} to {self.layers - 1}")
        if upto == self.frozen:
            return
        before = time.process_time()
        whole = self.weights
        inner, values = self.sizes[self.frozen : upto + 1], self._line.weights(0)
        fresh = values[: _size(inner)]
        inputs = hidden(inner, fresh, self._samples.inputs)[-1]
        self.client_cpu_s += time.process_time() - before
        self._samples = Samples(inputs, self._samples.targets)
        self._prefix, self.frozen = whole[: _size(self.sizes[: upto + 1])], upto
        self._resume(values[len(fresh) :])

    def _resume(self, values: FlatWeights) -> None:
        """Go on with the layers behind the prefix, at the same round."""
        spec = ModelSpec(architecture=Mlp(sizes=self.sizes[self.frozen :]))
        start = Weights(values.copy(), spec.spec_id)
        done = self._job.round_id
        self._line = FedAvg(spec, self.local, self.clients_per_round, start_weights=start)
        self._job = FederatedJob(self._line, self.population, self.seed)
        self._job.round_id = done  # the same clients, batches and rates as without freezing


class PlasticityWatch:
    """The server's decision: how many layers have converged.

    Args:
        inputs: samples that the server holds, [B, ...].
    """

    def __init__(self, sizes: tuple[int, ...], inputs: Tensor, config: FreezeConfig) -> None:
        if len(inputs) < 2:
            raise ConfigError("inputs", len(inputs), "at least 2 samples to compare")
        self.sizes, self.inputs, self.config = sizes, inputs, config
        self.frozen = 0
        self.readings: list[Reading] = []
        self._track = ModuleTrack(0, config.window, config.coef)
        self._past: collections.deque[list[Tensor]] = collections.deque(maxlen=config.lag)

    def observe(self, round_id: int, weights: FlatWeights) -> int:
        """Look at the whole model after a round and return the length of the frozen prefix."""
        last = len(self.sizes) - 2  # the output layer is always trained
        if self.frozen >= last or (round_id + 1) % self.config.every:
            return self.frozen
        inner = self.sizes[:-1]
        now = [gram(part) for part in hidden(inner, weights[: _size(inner)], self.inputs)]
        if len(self._past) == self.config.lag:
            value = sp_loss(now[self.frozen], self._past[0][self.frozen])
            if value is not None:
                self.readings.append(self._track.add(value))
        self._past.append(now)
        if self._track.converged:
            self.frozen += 1
            self._track = ModuleTrack(self.frozen, self.config.window, self.config.coef)
        return self.frozen


def hidden(sizes: tuple[int, ...], weights: FlatWeights, inputs: Tensor) -> list[Tensor]:
    """Activations behind each layer of an MLP's front, after ReLU, float32 [N, size] each."""
    found, value, at = [], inputs, 0
    for inner, outer in itertools.pairwise(sizes):
        spec = ModelSpec(architecture=Mlp(sizes=(inner, outer)))
        part = weights[at : at + _size((inner, outer))]
        value = outputs(spec, part, value).relu().clone()
        at += len(part)
        found.append(value)
    return found


def linear_schedule(sizes: tuple[int, ...], rounds: int, sent: float) -> list[int]:
    """Prefix after each round, layers frozen at equal intervals, that sends most nearly ``sent``.

    Args:
        sent: parameters that a client of every round sends together, as of :func:`sent_by`.
    """
    layers = len(sizes) - 2
    choices = [
        [min(done // step, layers) for done in range(1, rounds + 1)]
        for step in range(1, rounds + 1)
    ]
    return min(choices, key=lambda choice: abs(sent_by(sizes, choice) - sent))


def sent_by(sizes: tuple[int, ...], prefix_after: list[int]) -> int:
    """Parameters that one client of every round sends under a schedule of prefixes."""
    during = [0, *prefix_after[:-1]]
    return sum(_size(sizes[prefix:]) for prefix in during)


def _size(sizes: tuple[int, ...]) -> int:
    """Parameters of the linear layers between these widths."""
    return sum((inner + 1) * outer for inner, outer in itertools.pairwise(sizes))
