"""Figures and reports of LTE: quality against sparsity, layers, training curves, latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raysys.report import Section, new_figure, render_page
from raysys.runs import RunDirectory

MARKERS = ("o", "s", "^")
COLORS = 6  # of the house's palette


def tradeoff_figure(points: Sequence[tuple[str, float, float]]) -> Any:
    """One point per model: FFN sparsity and held-out nats; names are in the legend."""
    figure, axes = new_figure(width=8.0)
    for index, (name, sparsity, nats) in enumerate(points):
        marker = MARKERS[index // COLORS % len(MARKERS)]  # colours repeat, with another marker
        axes.plot([sparsity], [nats], marker=marker, linestyle="", markersize=7, label=name)
    axes.set_xlabel("FFN sparsity")
    axes.set_ylabel("held-out nats")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def quality_figure(points: Sequence[tuple[str, float, float]]) -> Any:
    """Held-out nats over FFN sparsity, one line per method through all its points."""
    figure, axes = new_figure()
    for index, name in enumerate(dict.fromkeys(name for name, _, _ in points)):
        mine = sorted((sparsity, nats) for other, sparsity, nats in points if other == name)
        marker = MARKERS[index % len(MARKERS)]
        axes.plot(*zip(*mine), marker=marker, markersize=5, label=name)
    axes.set_xlabel("FFN sparsity")
    axes.set_ylabel("held-out nats")
    axes.legend(fontsize=8)
    return figure


def layer_figure(layers: Mapping[str, Sequence[float]]) -> Any:
    """Sparsity of each layer, one line per model."""
    figure, axes = new_figure()
    for name, values in layers.items():
        axes.plot(range(len(values)), values, marker="o", markersize=4, label=name)
    axes.set_ylim(0, 1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("layer")
    axes.set_ylabel("share of experts off")
    axes.legend(fontsize=8)
    return figure


def curve_figure(curve: Sequence[Mapping[str, Any]]) -> Any:
    """Held-out perplexity and sparsity over training tokens, one above the other."""
    figure, axes = new_figure(2, 1, height=4.6)
    tokens = [row["tokens"] for row in curve]
    labels = ("held-out perplexity", "FFN sparsity")
    for axis, key, label in zip(axes, ("perplexity", "sparsity"), labels):
        axis.plot(tokens, [row[key] for row in curve], marker="o", markersize=4)
        axis.set_ylabel(label)
    axes[1].set_xlabel("training tokens")
    return figure


def latency_figure(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Time of the sparse FFN over the dense one's, by sparsity, one line per batch size."""
    figure, axes = new_figure()
    for tokens in sorted({row["tokens"] for row in rows}):
        mine = sorted((r for r in rows if r["tokens"] == tokens), key=lambda r: r["sparsity"])
        label = f"{tokens} token{'s' if tokens > 1 else ''}"
        axes.plot([r["sparsity"] for r in mine], [1 / r["speedup"] for r in mine], marker="o",
                  markersize=4, label=label)  # fmt: skip
    axes.plot([0, 1], [1, 0], linestyle="--", linewidth=1, color="#8a8f98", label="proportional")
    axes.set_xlabel("FFN sparsity")
    axes.set_ylabel("time, share of torch's dense FFN")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return figure


def save_report(run: RunDirectory, title: str, lead: str, sections: Sequence[Section]) -> None:
    """Write ``report.html`` into a run directory."""
    run.storage.write("report.html", render_page(title, lead, sections).encode())
