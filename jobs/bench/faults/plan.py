"""What is killed and when, drawn from a seed, and the books of what really died."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from raysys.bench import Claim
from raysys.config import check_range
from raysys.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Blow:
    """One SIGKILL to come.

    Args:
        victim: kind of process, such as ``"worker"``.
        moment: when, as a share of the time that lies before the next blow; in [0, 1).
    """

    victim: str
    moment: float

    def __post_init__(self) -> None:
        check_range(self, "moment", 0, 1, high_open=True)


def draw_blows(seed: int, system: str, victims: Sequence[str], count: int) -> list[Blow]:
    """Draw ``count`` blows; every kind of victim comes once before any comes twice.

    Raises:
        ConfigError: there is nothing to kill.
    """
    if not victims:
        raise ConfigError("victims", victims, "at least one kind of process")
    rng = random.Random(f"{seed}:{system}")
    order: list[str] = []
    while len(order) < count:
        order += rng.sample(list(victims), len(victims))
    return [Blow(victim=victim, moment=rng.random()) for victim in order[:count]]


@dataclass(slots=True)
class Tally:
    """What happened.

    Args:
        kills: SIGKILLs that met a living process, by kind.
        late: blows whose program had already ended, by kind; they prove nothing.
        absent: blows whose victim was not there (just being replaced), by kind.
        trials: one JSON-ready row for each disturbed run; ``held`` says whether it met the promise.
    """

    kills: Counter[str] = field(default_factory=Counter)
    late: Counter[str] = field(default_factory=Counter)
    absent: Counter[str] = field(default_factory=Counter)
    trials: list[dict[str, Any]] = field(default_factory=list)

    def held(self) -> float:
        """Share of the counted trials that met the promise; 0.0 where none counts.

        A trial in which nothing was killed in time is no evidence and is not counted.
        """
        counted = [row for row in self.trials if row["kills"]]
        return sum(bool(row["held"]) for row in counted) / len(counted) if counted else 0.0

    def claim(self, system: str, promise: str, seed: int) -> Claim:
        """The books as a claim."""
        samples = {
            "promise": promise,
            "kills": dict(self.kills),
            "kills_in_all": self.kills.total(),
            "late": dict(self.late),
            "absent": dict(self.absent),
            "trials": self.trials,
        }
        return Claim(
            name=system,
            value=self.held(),
            unit="share of disturbed runs that kept the promise",
            better="higher",
            samples=samples,
            seeds=[seed],
        )
