"""Figures of a training run: plasticity per module, and when it froze."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from raysys.report import new_figure


def plasticity_figure(events: Sequence[Mapping[str, Any]]) -> Any:
    """Smoothed plasticity over steps, one line per module; crosses mark changes of the prefix."""
    figure, axes = new_figure()
    curves: dict[int, tuple[list[int], list[float]]] = {}
    for event in events:
        if event["event"] == "reading":
            steps, values = curves.setdefault(event["module"], ([], []))
            steps.append(event["step"])
            values.append(max(event["smoothed"], 1e-12))
    for module, (steps, values) in sorted(curves.items()):
        axes.plot(steps, values, label=f"module {module}", linewidth=1.2)
    for event in events:
        if event["event"] == "applied":
            axes.axvline(event["step"], color="#8a8f98", linewidth=0.6, linestyle="--")
    if curves:
        axes.set_yscale("log")
        axes.legend(fontsize=8)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("smoothed plasticity")
    return figure


def plasticity_svg(events: Sequence[Mapping[str, Any]]) -> str:
    """The figure as SVG text."""
    buffer = io.StringIO()
    plasticity_figure(events).savefig(buffer, format="svg")
    return buffer.getvalue()
