"""Which points of a sweep nobody beats in both sparsity and quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def mark_pareto(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Add ``pareto`` to rows with ``sparsity`` (more is better) and ``nll`` (less is better)."""
    marked = []
    for row in rows:
        beaten = any(
            other["sparsity"] >= row["sparsity"]
            and other["nll"] <= row["nll"]
            and (other["sparsity"] > row["sparsity"] or other["nll"] < row["nll"])
            for other in rows
        )
        marked.append({**row, "pareto": not beaten})
    return marked
