"""The benchmark contract: what ``python -m jobs.bench SYSTEM --json`` writes.

A benchmark measures ours and a baseline side by side in one run and reports; it never judges
itself. A system's module ``jobs/bench/SYSTEM.py`` defines ``CLAIMS``, a mapping from the claim's
name to a function ``(Profile) -> Claim``, and ``CONFIG``, a JSON-ready description of the set-up.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from raysys.errors import ConfigError

Better = Literal["higher", "lower"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """How much work a claim may do: ``quick`` keeps a whole system within minutes.

    Args:
        partial: folder where long claims keep finished pieces (:mod:`jobs.bench.pieces`), so that
            an interrupted run goes on; empty keeps nothing.
    """

    name: Literal["quick", "full"] = "quick"
    partial: str = ""

    @property
    def full(self) -> bool:
        return self.name == "full"

    def pick(self, quick: Any, full: Any) -> Any:
        """Return the value that belongs to this profile."""
        return full if self.full else quick


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Baseline:
    """What ours is compared with, measured in the same run."""

    name: str
    value: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """One measured statement.

    Args:
        name: identifier of the claim, such as ``"clients_per_second_vs_loop"``.
        value: our figure; the median where ``samples`` has several.
        unit: unit of ``value`` and of ``baseline.value``.
        better: whether a higher or a lower value is better.
        baseline: the other side, or None where the claim has none.
        ratio: ours over the baseline (or as ``samples`` explains); None without a baseline.
        samples: the raw repeats, JSON-ready; free-form so that tables fit.
        seeds: random seeds used.
    """

    name: str
    value: float
    unit: str
    better: Better
    baseline: Baseline | None = None
    ratio: float | None = None
    samples: Any = ()
    seeds: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.better not in ("higher", "lower"):
            raise ConfigError("better", self.better, "'higher' or 'lower'")
        if not math.isfinite(self.value):
            raise ConfigError("value", self.value, "a finite number", f"Claim {self.name}")


ClaimFunction = Callable[[Profile], Claim]


def paired_claim(
    name: str,
    unit: str,
    better: Better,
    *,
    ours: Sequence[float],
    baseline_name: str,
    baseline: Sequence[float],
    seeds: Sequence[int] = (),
    extra: Mapping[str, Any] | None = None,
) -> Claim:
    """Claim from repeats taken alternately: medians of both sides, median of the paired ratios.

    Args:
        ours: our figure in each repeat, in ``unit``.
        baseline: the baseline's figure in the same repeats; same length as ``ours``.
        extra: further JSON-ready entries for ``samples``.

    Raises:
        ConfigError: the two sides differ in length or are empty.
    """
    if not ours or len(ours) != len(baseline):
        raise ConfigError("baseline", len(baseline), f"{len(ours)} repeats, at least one")
    ratios = [mine / other if other else math.inf for mine, other in zip(ours, baseline)]
    return Claim(
        name=name,
        value=statistics.median(ours),
        unit=unit,
        better=better,
        baseline=Baseline(name=baseline_name, value=statistics.median(baseline)),
        ratio=statistics.median(ratios),
        samples={"ours": list(ours), "baseline": list(baseline), "ratio": ratios, **(extra or {})},
        seeds=list(seeds),
    )


def result_to_dict(
    system: str,
    profile: Profile,
    claims: Sequence[Claim],
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    duration_s: float,
) -> dict[str, Any]:
    """Lay out a benchmark's result as the JSON object of the contract."""
    return {
        "system": system,
        "profile": profile.name,
        "claims": [dataclasses.asdict(claim) for claim in claims],
        "config": dict(config),
        "environment": dict(environment),
        "duration_s": round(duration_s, 3),
    }
