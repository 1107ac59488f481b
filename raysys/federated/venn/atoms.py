"""Keeps the number of atoms bounded: rare eligibility masks are folded into smaller ones."""

from __future__ import annotations

from collections.abc import Sequence

MAX_ATOMS = 4096


def merge_rare(
    masks: Sequence[int], rates: Sequence[float], limit: int = MAX_ATOMS
) -> tuple[list[int], list[float], int]:
    """Keep the ``limit`` most frequent masks and give the others' rates to subsets of theirs.

    A mask goes to its largest subset among the kept ones, and to the empty mask if there is none.
    That is safe: a subset only hides eligibility, it never invents it.

    Returns:
        The kept masks (ascending, the empty mask added when it is needed), their rates, and how
        many masks were folded.
    """
    if len(masks) <= limit:
        return list(masks), list(rates), 0
    order = sorted(range(len(masks)), key=lambda atom: (-rates[atom], masks[atom]))
    kept = {masks[atom]: rates[atom] for atom in order[:limit]}
    for atom in order[limit:]:
        subsets = [mask for mask in kept if mask & masks[atom] == mask]
        target = max(subsets, key=lambda mask: (mask.bit_count(), mask), default=0)
        kept[target] = kept.get(target, 0.0) + rates[atom]
    ordered = sorted(kept)
    return ordered, [kept[mask] for mask in ordered], len(masks) - limit
