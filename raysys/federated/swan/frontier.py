"""Pruning: a slower choice is kept only if it gives something back to the owner.

Specification 3.4. The frontier is ordered from fastest and dearest to slowest and cheapest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from raysys.federated.swan.choices import Choice, Cost


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What is known of a choice.

    Args:
        seconds: median step time. seconds_p95: 95th percentile.
        joules: energy of a step, NaN when unknown. source: where the joules come from.
        steps: steps behind the estimate; 0 for a prediction.
    """

    choice: Choice
    cost: Cost
    seconds: float
    seconds_p95: float = 0.0
    joules: float = float("nan")
    source: str = "none"
    steps: int = 0

    @property
    def measured(self) -> bool:
        return self.steps > 0


def prune(
    estimates: Sequence[Estimate], *, by_energy: bool = False, keep_ties: bool = False
) -> list[Estimate]:
    """The Pareto frontier over time and cost.

    Args:
        by_energy: also drop a choice that another kept one beats in both time and energy, except
            the cheapest, which must stay reachable.
        keep_ties: of choices with the same time keep the dearer ones too. By default only the
            cheapest stays, because moving to it costs no time.

    Returns:
        Rising in time and strictly falling in cost (with ``keep_ties`` times may repeat).
    """
    ordered = sorted(estimates, key=lambda item: item.cost, reverse=keep_ties)
    ordered.sort(key=lambda item: round(item.seconds, 12))
    kept: list[Estimate] = []
    for item in ordered:
        if not kept or item.cost < kept[-1].cost:
            kept.append(item)
    if not by_energy:
        return kept
    last = kept[-1:]
    return [
        item
        for item in kept[:-1]
        if not any(o.seconds < item.seconds and o.joules < item.joules for o in kept)
    ] + last


def best_index(frontier: Sequence[Estimate], joule_price_s: float = 0.0) -> int:
    """Place of the choice that minimises ``seconds + price * joules``."""

    powers = [item.joules / item.seconds for item in frontier if item.joules == item.joules]
    # What was not measured must not look thrifty: it is taken to draw as much as the thirstiest.
    usual_w = max(powers, default=0.0)

    def value(index: int) -> float:
        item = frontier[index]
        joules = item.joules if item.joules == item.joules else usual_w * item.seconds
        return item.seconds + joule_price_s * joules

    return min(range(len(frontier)), key=value)
