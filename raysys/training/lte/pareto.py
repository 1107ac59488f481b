"""Which points of a sweep nobody beats in both sparsity and quality, and which may stop early."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raysys.training.lte.config import require


def mark_pareto(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Add ``pareto`` to rows with ``sparsity`` (more is better) and ``nll`` (less is better).

    A row that was ``stopped`` early is not in the set: its figures are not final.
    """
    marked = []
    for row in rows:
        beaten = any(
            other["sparsity"] >= row["sparsity"]
            and other["nll"] <= row["nll"]
            and (other["sparsity"] > row["sparsity"] or other["nll"] < row["nll"])
            for other in rows
        )
        marked.append({**row, "pareto": not beaten and not row.get("stopped", False)})
    return marked


def hopeless(rows: Sequence[Mapping[str, Any]], margin: float) -> list[bool]:
    """Which points another one beats so clearly after stage 1 that stage 2 is not worth its steps.

    A point stops where another has at least its sparsity and is better by more than ``margin``
    nats. The best point of every sparsity goes on, so the Pareto set keeps its ends.

    Args:
        rows: ``sparsity`` and ``nll`` of every point, at the same step.
        margin: what stage 2 may be expected to change in their distance; infinite stops nobody.

    Raises:
        LTEConfigError: the margin is negative or NaN.
    """
    require("stop_margin", margin, margin >= 0, "0 or more nats")
    return [
        any(
            other["sparsity"] >= row["sparsity"] and other["nll"] + margin < row["nll"]
            for other in rows
        )
        for row in rows
    ]
