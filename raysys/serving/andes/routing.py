"""Which replica takes a request: the one whose readers lose the least by it.

The paper's scheduler works inside one engine; this is ours. A replica is seen as a fluid server:
the batch that its KV room holds makes so many tokens per second, its readers consume so many, and
the text that they have not read yet is a stock that bridges a shortage. A replica that can serve a
share rho of what its readers take gives each of them a QoE of ``1 / (2 - rho)`` (the closed form
of a stream at rho times the reading speed). The request goes where the sum of everybody's losses
grows the least; where nobody loses, to the replica with the lowest utilisation.

Shapes: none; a fleet is small and a request is routed once, so these are plain numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from raysys.config import check_range
from raysys.serving.andes.models import StepTime
from raysys.serving.andes.spec import QoESpec


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingConfig:
    """Options of the router.

    Args:
        horizon_s: look-ahead of the estimate.
        max_age_s: statistics older than this are not used; the request then goes to the shortest
            queue.
        balance: weight of the utilisation beside the loss: it decides only where losses are equal.
    """

    horizon_s: float = 30.0
    max_age_s: float = 5.0
    balance: float = 0.01

    def __post_init__(self) -> None:
        check_range(self, "horizon_s", 0.0, 3600.0, low_open=True)
        check_range(self, "max_age_s", 0.0, low_open=True)
        check_range(self, "balance", 0.0, 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaLoad:
    """What one replica has to do, as its scheduler reports it.

    Args:
        time_s: when this was true, on the clock of :class:`SentRequests`.
        capacity_tokens: KV room.
        max_batch: most sequences in a step.
        step_time: the engine's learnt step time.
        readers: live requests, waiting ones included.
        demand_tds: tokens/s that the readers consume together.
        unread_tokens: delivered and not yet read, over all readers.
        context_tokens: KV that all live requests need together.
        missing_tokens: tokens to compute before those without KV get their next token.
        below_target: readers whose QoE would be below 0.95 if it were scored now.
    """

    time_s: float = 0.0
    capacity_tokens: float
    max_batch: int
    step_time: StepTime = field(default_factory=StepTime)
    readers: int = 0
    demand_tds: float = 0.0
    unread_tokens: float = 0.0
    context_tokens: float = 0.0
    missing_tokens: float = 0.0
    below_target: int = 0

    def with_reader(self, spec: QoESpec, prompt_tokens: float) -> ReplicaLoad:
        """The load after one more request came in."""
        return replace(
            self,
            readers=self.readers + 1,
            demand_tds=self.demand_tds + spec.tds,
            context_tokens=self.context_tokens + prompt_tokens,
            missing_tokens=self.missing_tokens + prompt_tokens,
        )

    def speed(self, batch_limit: int | None = None) -> float:
        """Tokens per second of the largest batch that fits: memory, places, ``batch_limit``."""
        mean = self.context_tokens / self.readers if self.readers else 1.0
        batch = min(self.capacity_tokens / max(mean, 1.0), self.max_batch)
        if batch_limit is not None:
            batch = min(batch, batch_limit)
        batch = max(1.0, batch)
        return batch / float(self.step_time.predict(batch, 0.0, batch * mean))

    @property
    def utilisation(self) -> float:
        """Demand over the speed of a full batch."""
        return self.demand_tds / self.speed()


def expected_loss(load: ReplicaLoad, horizon_s: float) -> float:
    """QoE that all readers of a replica together lose by its shortage within the horizon."""
    if not load.readers or load.demand_tds <= 0.0:
        return 0.0
    busy_s = load.missing_tokens * load.step_time.per_prefill_token_s
    made = load.speed(load.readers) * max(0.0, horizon_s - busy_s)
    share = min(1.0, (made + load.unread_tokens) / (load.demand_tds * horizon_s))
    return load.readers * (1.0 - 1.0 / (2.0 - share))


def added_loss(
    load: ReplicaLoad, spec: QoESpec, prompt_tokens: float, config: RoutingConfig
) -> float:
    """What the fleet loses if the replica takes the request.

    The residents' loss, and the newcomer's for its first token coming late: behind the prompts
    that must be computed before, ``delta`` late costs ``2 delta / (horizon + 2 delta)``.
    """
    after = load.with_reader(spec, prompt_tokens)
    shortage = expected_loss(after, config.horizon_s) - expected_loss(load, config.horizon_s)
    step_s = float(load.step_time.predict(after.readers, 0.0, after.context_tokens))
    first_s = after.missing_tokens * load.step_time.per_prefill_token_s + step_s
    late_s = max(0.0, first_s - spec.ttft_s)
    late = spec.weight * 2.0 * late_s / (config.horizon_s + 2.0 * late_s)
    return shortage + late + config.balance * after.utilisation


def rank_replicas(
    loads: Sequence[ReplicaLoad],
    spec: QoESpec,
    prompt_tokens: float,
    config: RoutingConfig,
) -> list[int]:
    """Replicas by what they would lose, least first; ties by position."""
    losses = [added_loss(load, spec, prompt_tokens, config) for load in loads]
    return sorted(range(len(loads)), key=lambda index: (losses[index], index))


class SentRequests:
    """What this router sent and a replica's statistics cannot know of yet.

    A burst arrives faster than statistics do; without this, all of it would go to the replica that
    looked best before the burst.

    Args:
        clock: seconds, the same clock as :attr:`ReplicaLoad.time_s` (wall clock between hosts).
        memory_s: how long a request is remembered at most: longer than statistics take.
    """

    def __init__(self, clock: Callable[[], float], memory_s: float = 5.0) -> None:
        self._clock = clock
        self._memory_s = memory_s
        self._sent: dict[str, deque[tuple[float, QoESpec, float]]] = {}

    def note(self, replica: str, spec: QoESpec, prompt_tokens: float) -> None:
        """A request went to ``replica`` now."""
        queue = self._sent.setdefault(replica, deque(maxlen=4096))
        queue.append((self._clock(), spec, prompt_tokens))

    def known_load(self, replica: str, load: ReplicaLoad) -> ReplicaLoad:
        """The reported load with the requests that were sent since the report."""
        queue = self._sent.get(replica)
        if not queue:
            return load
        oldest = self._clock() - self._memory_s
        while queue and queue[0][0] <= max(oldest, load.time_s):
            queue.popleft()
        for _, spec, prompt_tokens in queue:
            load = load.with_reader(spec, prompt_tokens)
        return load

    def keep_only(self, replicas: Sequence[str]) -> None:
        """Forget replicas that are gone."""
        for gone in set(self._sent) - set(replicas):
            del self._sent[gone]


def load_to_dict(load: ReplicaLoad) -> dict[str, Any]:
    """A load as flat JSON-ready numbers; ``step_time`` is nested."""
    names = ReplicaLoad.__dataclass_fields__
    values = {name: getattr(load, name) for name in names if name != "step_time"}
    coefficients = StepTime.__dataclass_fields__
    values["step_time"] = {name: getattr(load.step_time, name) for name in coefficients}
    return values


def load_from_dict(values: Mapping[str, Any]) -> ReplicaLoad | None:
    """The load that :func:`load_to_dict` wrote, or None where it is not one (another version)."""
    try:
        known = {name: values[name] for name in ReplicaLoad.__dataclass_fields__}
        known["step_time"] = StepTime(**known["step_time"])
        return ReplicaLoad(**known)
    except (KeyError, TypeError, ValueError):
        return None
