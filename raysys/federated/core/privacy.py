"""Differential privacy, central and local, with the guarantee of a well-kept accountant.

Central (McMahan et al. 2018, DP-FedAvg): every client joins a round independently with probability
q, its update is clipped to C, and the server adds Gaussian noise of deviation z C to the *sum* and
divides by the expected number of clients. A trusted server sees updates; the released models are
(epsilon, delta)-private for adding or removing all data of one client. Local: each client clips and
adds noise of deviation z C itself, so that the server need not be trusted; the guarantee is for
replacing one client's data, hence sensitivity 2 C, and counts how often a client took part at most.

Epsilon comes from Google's ``dp-accounting`` (privacy loss distributions), never from own code.
Noise is drawn from a keyed stream, so that a run resumes exactly: whoever knows ``noise_seed``, or
the job's seed where none is given, can subtract it. Keep it secret when the model leaves the house.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from raysys.config import check, check_choice, check_range
from raysys.errors import CapabilityError, ConfigError
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.messages import FeedbackSpec, ScreenConfig
from raysys.federated.core.model import ModelSpec
from raysys.federated.core.randomness import Purpose, generator
from raysys.federated.core.server import ServerOptimizer
from raysys.federated.core.strategy import Demand, JobFacts, RoundReport, StateArrays

MODES = ("central", "local")
TIGHT_BELOW = 30.0
RENYI_ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512)  # whole ones have closed forms


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PrivacyConfig:
    """A privacy mechanism.

    Args:
        mode: "central" (trusted server) or "local" (each client adds its own noise).
        clip_norm: C, longest update of a client.
        noise_multiplier: z, noise deviation over C; give this or ``epsilon``.
        epsilon: target after ``rounds`` rounds, from which z is computed.
        delta: probability that the bound fails; well below one over the population.
        rounds: rounds that the target is meant for (central), or participations of the busiest
            client (local).
        noise_seed: secret seed of the noise; None takes the job's (for simulation).
    """

    mode: str = "central"
    clip_norm: float = 1.0
    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float = 1e-5
    rounds: int = 100
    noise_seed: int | None = None

    def __post_init__(self) -> None:
        check_choice(self, "mode", MODES)
        check_range(self, "clip_norm", 0, low_open=True)
        check_range(self, "delta", 0, 1, low_open=True, high_open=True)
        check_range(self, "rounds", 1)
        one = (self.noise_multiplier is None) != (self.epsilon is None)
        check(self, "epsilon", one, "either epsilon or noise_multiplier, not both")
        for name in ("epsilon", "noise_multiplier"):
            if getattr(self, name) is not None:
                check_range(self, name, 0, low_open=True)

    def multiplier(self, sampling: float) -> float:
        """z: as given, or the smallest that keeps ``rounds`` rounds within ``epsilon``."""
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        assert self.epsilon is not None
        return _calibrated(self.mode, self.epsilon, self.delta, sampling, self.rounds)

    def screen(self, screen: ScreenConfig, multiplier: float) -> ScreenConfig:
        """The screening that the guarantee allows: by the clip alone, never by other updates."""
        noise = multiplier * self.clip_norm if self.mode == "local" else 0.0
        return dataclasses.replace(
            screen,
            clip_norm=self.clip_norm,
            reject_factor=None,
            min_fraction=0.0,
            local_noise=noise,
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Guarantee:
    """What was spent: (epsilon, delta), and what it is of, in words."""

    epsilon: float
    delta: float
    noise_multiplier: float
    mode: str
    steps: int
    statement: str


@runtime_checkable
class GivesGuarantee(Protocol):
    """A strategy that may be private."""

    def guarantee(self) -> Guarantee | None:
        """What the rounds so far have spent; None without privacy."""
        ...


class PrivateAvg(FedAvg):
    """FedAvg under a privacy mechanism; any server optimiser on top, since it only sees D.

    Clients count alike: weights by samples would need a bound on them.

    In an ensemble a client's update goes to one of K models, chosen by its own past alone. All K
    sums together are then one vector that a client moves by at most C, with noise on every part:
    the guarantee is that of one model, whatever K. ``lines`` is K: a model expects 1/K of a round.
    """

    def __init__(
        self,
        spec: ModelSpec,
        local: LocalConfig,
        clients_per_round: int,
        privacy: PrivacyConfig,
        server: ServerOptimizer | None = None,
    ) -> None:
        super().__init__(spec, local, clients_per_round, server, "uniform")
        self.privacy = privacy
        self._feedback = FeedbackSpec(weighting="uniform")
        self.lines = 1
        self._member = 0
        self._population = 0
        self._seed = 0
        self._multiplier = 0.0
        self._took_part = np.zeros(0, dtype=np.int32)

    @property
    def sampling(self) -> float:
        """q, probability that a client joins a round."""
        return self.clients_per_round / self._population

    def start(self, facts: JobFacts) -> None:
        """Compute the noise multiplier, once the population is known."""
        super().start(facts)
        if self.privacy.mode == "central" and facts.population.availability is not None:
            raise ConfigError(
                "population.availability", "intervals", "none with central privacy",
                "Whoever is reachable would join more often than the guarantee assumes",
            )  # fmt: skip
        self._member = facts.member
        self._population = facts.population.n_clients
        self._seed = facts.seed if self.privacy.noise_seed is None else self.privacy.noise_seed
        self._multiplier = self.privacy.multiplier(self.sampling)
        if not len(self._took_part):
            self._took_part = np.zeros(self._population, dtype=np.int32)

    def demand(self, round_id: int) -> list[Demand]:
        """Central: a binomial number, of which uniform choice makes independent joining."""
        if self.privacy.mode == "local":
            return super().demand(round_id)
        rng = generator(self._seed, Purpose.PRIVACY, round_id, 2**63)
        return [Demand(clients=int(rng.binomial(self._population, self.sampling)))]

    def close(self, round_id: int, report: RoundReport) -> None:
        """Noise on the sum, then the server step.

        Central: the number of clients stays hidden, so a round without any is noise alone. Local:
        the server sees who answers and divides by their number.
        """
        folded, self._folded = self._folded, None
        table = report.table
        np.add.at(self._took_part, table.clients[table.ok], 1)
        weights = self.weights(0)
        if self.privacy.mode == "central":
            # Members of an ensemble need noise of their own: a shared one would cancel.
            stream = 2**62 + self._member if self._member else 0
            rng = generator(self._seed, Purpose.PRIVACY, round_id, stream)
            deviation = self._multiplier * self.privacy.clip_norm
            total = deviation * rng.standard_normal(len(weights))
            total += 0.0 if folded is None else folded.delta
            mean = total / (self.clients_per_round / self.lines)
            self._values = self.server.step(weights, mean)
        elif folded is not None and folded.weight > 0:
            self._values = self.server.step(weights, folded.mean())
        self._version += 1

    def guarantee(self) -> Guarantee:
        """What the rounds so far have spent."""
        mode, z = self.privacy.mode, self._multiplier
        if mode == "central":
            steps = self._version
            whom = "the released models, for adding or removing all data of one client"
        else:
            steps = int(self._took_part.max(initial=0))
            whom = "all that the server sees of one client, for replacing its data"
        epsilon = spent_epsilon(mode, z, self.privacy.delta, self.sampling, steps)
        statement = (
            f"({epsilon:.3g}, {self.privacy.delta:g})-differential privacy of {whom}; "
            f"noise multiplier {z:.3g}, {steps} "
            + (f"rounds at sampling rate {self.sampling:.3g}" if mode == "central" else "answers")
        )
        return Guarantee(
            epsilon=epsilon,
            delta=self.privacy.delta,
            noise_multiplier=z,
            mode=mode,
            steps=steps,
            statement=statement,
        )

    def state(self) -> StateArrays:
        """FedAvg's state, and how often each client took part."""
        return {
            **super().state(),
            "privacy.took_part": self._took_part,
            "privacy.multiplier": np.array([self._multiplier]),
        }

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore; refuses a checkpoint that was made with another amount of noise."""
        if "privacy.took_part" not in state:
            raise ConfigError("state", sorted(state), "a state of private averaging")
        found = float(state["privacy.multiplier"][0])
        if found != self._multiplier:
            raise ConfigError("privacy.noise_multiplier", self._multiplier, f"as before: {found}")
        super().load(state)
        self._took_part = np.array(state["privacy.took_part"], dtype=np.int32)


def spent_epsilon(mode: str, multiplier: float, delta: float, sampling: float, steps: int) -> float:
    """Epsilon after ``steps`` rounds (central) or answers of one client (local).

    Raises:
        CapabilityError: ``dp-accounting`` is not installed.
    """
    if steps == 0:
        return 0.0
    dp = _accounting()
    event = _event(mode, multiplier, sampling, steps)
    renyi = float(dp.rdp.RdpAccountant(RENYI_ORDERS).compose(event).get_epsilon(delta))
    if renyi > TIGHT_BELOW:
        return renyi  # a valid bound; the tight one would need gigabytes to say "nothing is left"
    tight = dp.pld.PLDAccountant(value_discretization_interval=1e-3).compose(event)
    return min(renyi, float(tight.get_epsilon(delta)))


@functools.lru_cache(maxsize=16)
def _calibrated(mode: str, epsilon: float, delta: float, sampling: float, steps: int) -> float:
    """Noise multiplier for a target, by bisection inside ``dp-accounting``.

    By Renyi accounting, which is quick and a little generous: what is spent, told by the tight
    accountant, stays below the target.
    """
    dp = _accounting()
    found = dp.calibrate_dp_mechanism(
        lambda: dp.rdp.RdpAccountant(RENYI_ORDERS),
        lambda z: _event(mode, z, sampling, steps),
        epsilon,
        delta,
        dp.LowerEndpointAndGuess(1e-2, 1.0),
        tol=1e-3,
    )
    return float(found)


def _event(mode: str, multiplier: float, sampling: float, steps: int) -> Any:
    dp = _accounting()
    if mode == "local":
        # Replacing a client's data moves its clipped update by 2 C at most, so z counts half.
        return dp.SelfComposedDpEvent(dp.GaussianDpEvent(multiplier / 2), steps)
    joined = dp.PoissonSampledDpEvent(min(sampling, 1.0), dp.GaussianDpEvent(multiplier))
    return dp.SelfComposedDpEvent(joined, steps)


def _accounting() -> Any:
    try:
        import dp_accounting
    except ImportError as error:
        raise CapabilityError(
            "differential privacy", str(error), "pip install 'raysys[privacy]'"
        ) from error
    return dp_accounting
