"""Pages from kept pieces: AUC against bytes, row lengths by popularity, recovery from drift.

    python -m jobs.bench.fiited.figures FOLDER PAGE.html

FOLDER is the ``--partial`` folder of a benchmark run; nothing is measured here.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jobs.bench.pieces import page_command
from raysys.errors import DataError
from raysys.report import Cell, Plot, Section, Table, new_figure, render_page, series_color
from raysys.report.figures import INK

Rows = list[dict[str, Any]]
NAMES = {
    "full": "full width", "chunks": "FIITED", "chunks bf16": "FIITED, bfloat16",
    "rows": "whole rows", "frequency": "frequency only",
    "uniform": "uniform width", "hashing": "hashing trick",
    "quotient_remainder": "quotient-remainder",
}  # fmt: skip
DRIFT_RATIO = 0.95
LENGTH_COLORS = ("#8a8f98", "#cfe3f3", "#93c1e4", "#4c97d0", "#12517f")


def load(folder: str) -> Rows:
    """Runs of a folder, each with what it depended on and what it found.

    Raises:
        DataError: the folder holds no runs of this benchmark.
    """
    found = []
    for path in sorted(Path(folder).glob("fiited-*.json")):
        piece = json.loads(path.read_text(encoding="utf-8"))
        if "method" in piece["key"] and isinstance(piece["result"], dict):
            row = {"signal": "movielens", "weights": "fp32"} | piece["key"] | piece["result"]
            row["method"] += " bf16" if row["weights"] == "bf16" else ""
            found.append(row)
    if not found:
        raise DataError(folder, "holds no runs", "Run the benchmark with --partial FOLDER")
    return found


def page(rows: Rows) -> str:
    """The HTML page: one section per data set and stream size."""
    sections = []
    for signal in ("weak", "strong"):
        for full_stream, size in ((True, "whole stream"), (False, "a quarter of the stream")):
            mine = [
                r for r in rows if r["signal"] == signal and r.get("full_stream") == full_stream
            ]
            if mine:
                title = f"Planted stream, {signal} signal, {size}"
                sections.append(Section(title=title, tables=[_table(mine)], plots=_plots(mine)))
    movielens = [r for r in rows if r["signal"] == "movielens"]
    if movielens:
        plots = [bytes_plot(movielens)]
        sections.append(Section(title="MovieLens small", tables=[_table(movielens)], plots=plots))
    lead = (
        "Every method trains the same net with the same optimizer, predicting each batch before "
        "it trains on it. Bytes are resident bytes, index, sketch and buffers included; methods "
        "without an index count weights, optimizer state and the same buffers."
    )
    return render_page("Embedding tables under a budget: AUC, bytes and drift", lead, sections)


def _plots(rows: Rows) -> list[Plot]:
    plots = [bytes_plot([r for r in rows if r["gamma"] == 0.9 and r["utility"] == "freq_grad"])]
    ours = _mean_by(_chunks(rows), lambda r: r["ratio"], "lengths_by_popularity")
    plots += [lengths_plot(ratio, table) for ratio, table in sorted(ours.items())]
    if any(r["ratio"] == DRIFT_RATIO for r in _chunks(rows)):
        plots.append(drift_plot(rows))
    return plots


def _chunks(rows: Rows) -> Rows:
    return [
        r
        for r in rows
        if r["method"] == "chunks" and r["utility"] == "freq_grad" and r["gamma"] == 0.9
    ]


def _mean_by(rows: Rows, key: Callable[[Any], Any], field: str) -> dict[Any, Any]:
    """Element-wise mean of a field over the rows (seeds) of each key; rows without it are left."""
    found: dict[Any, list[Any]] = {}
    for row in rows:
        if field in row:
            found.setdefault(key(row), []).append(row[field])
    return {k: np.mean(np.array(values, float), axis=0) for k, values in found.items()}


def by_method(rows: Rows) -> dict[str, list[tuple[float, float, float]]]:
    """Per method, in the order of ``NAMES``: (ratio, mean MB, mean AUC) by rising bytes."""
    found: dict[str, dict[float, Rows]] = {}
    for row in rows:
        found.setdefault(row["method"], {}).setdefault(row["ratio"], []).append(row)
    return {
        method: sorted(
            (
                (
                    ratio,
                    statistics.fmean(r["bytes"] for r in some) / 1e6,
                    statistics.fmean(_auc(r) for r in some),
                )
                for ratio, some in found[method].items()
            ),
            key=lambda point: point[1],
        )
        for method in NAMES
        if method in found
    }


def _auc(row: Mapping[str, Any]) -> float:
    return float(row["late"] if "late" in row else row["auc"])


def bytes_plot(rows: Rows) -> Plot:
    """Mean AUC over mean resident bytes, one line per method, full width as a level."""
    figure, axes = new_figure(height=4.0)
    points = by_method(rows)
    for method, some in points.items():
        if method == "full":
            continue
        sizes, aucs = [p[1] for p in some], [p[2] for p in some]
        style = "s--" if method.endswith("bf16") else "o-"
        axes.plot(sizes, aucs, style, color=_color(method), label=NAMES[method], markersize=5)
    if "full" in points:
        _, size, auc = points["full"][0]
        axes.axhline(auc, color=INK, linestyle=":", linewidth=1)
        axes.plot([size], [auc], "D", color=INK, markersize=6, label=NAMES["full"])
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = [one * 10.0**power for power in range(-3, 6) for one in (1, 2, 3, 5, 7)]
    axes.set_xticks([t for t in ticks if low <= t <= high])
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.minorticks_off()
    axes.set_xlabel("resident MB, index included")
    axes.set_ylabel("AUC")
    axes.legend(fontsize=8, loc="lower right")
    ratios = sorted({p[0] for m, some in points.items() if m != "full" for p in some})
    given = ", ".join(f"{ratio:.0%}" for ratio in ratios)
    caption = (
        f"Points are the budgets ({given} of the weights pruned), means over seeds. A method that "
        "cannot reach a budget stands at the smallest size that it reaches."
    )
    return Plot(title="AUC against bytes", caption=caption, figure=figure)


def lengths_plot(ratio: float, table: Any) -> Plot:
    """Share of ids by row length, per band of popularity; ``table`` is ids [bands, k + 1]."""
    from jobs.bench.fiited.quality import BANDS

    figure, axes = new_figure(height=3.6)
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    places, base = np.arange(len(shares)), np.zeros(len(shares))
    for length in range(shares.shape[1]):
        label = "no memory" if not length else f"{length} of {shares.shape[1] - 1} chunks"
        axes.bar(places, shares[:, length], 0.85, bottom=base, label=label,
                 color=LENGTH_COLORS[length % len(LENGTH_COLORS)])  # fmt: skip
        base = base + shares[:, length]
    edges = [f"{100 * low:g} to {100 * high:g} %" for low, high in zip((0.0, *BANDS), BANDS)]
    axes.set_xticks(places, edges, fontsize=8)
    axes.set_xlabel("rank by popularity within the field, most popular first")
    axes.set_ylabel("share of ids")
    axes.legend(fontsize=8, ncols=shares.shape[1], loc="lower center", bbox_to_anchor=(0.5, 1.0))
    title = f"Row lengths by popularity, {ratio:.0%} pruned"
    return Plot(
        title=title, caption="FIITED at the end of the stream, mean over seeds.", figure=figure
    )


def drift_plot(rows: Rows) -> Plot:
    """AUC along the stream: full width, and FIITED at one budget with and without forgetting."""
    figure, axes = new_figure(height=3.8)
    kept = [r for r in rows if r["method"] == "full" or r["ratio"] == DRIFT_RATIO]
    curves = _mean_by(
        [r for r in kept if r["utility"] == "freq_grad"],
        lambda r: (r["method"], r["gamma"]),
        "curve",
    )
    for (method, gamma), curve in sorted(curves.items(), key=lambda c: (_rank(c[0][0]), c[0][1])):
        if method not in ("full", "chunks", "rows"):
            continue
        label = NAMES[method] + (f", gamma {gamma:g}" if method == "chunks" else "")
        at = (np.arange(len(curve)) + 0.5) / len(curve)
        style = "--" if gamma != 0.9 else "-"
        axes.plot(100 * at, curve, style, label=label, color=_color(method), linewidth=1.5)
    axes.axvline(50, linestyle=":", linewidth=1, color=INK)
    axes.set_xlabel("% of the stream")
    axes.set_ylabel("AUC, predicted before training")
    axes.legend(fontsize=8, loc="lower right")
    caption = (
        f"{DRIFT_RATIO:.0%} pruned but for full width; means over seeds. At the dotted line the "
        "most popular 2 % of ids change places with ids of the tail."
    )
    return Plot(title="Drift and recovery", caption=caption, figure=figure)


def _color(method: str) -> str:
    """The same in every figure; the reference in the colour of the text."""
    return INK if method == "full" else series_color(max(_rank(method) - 2, 0))


def _rank(method: str) -> int:
    return list(NAMES).index(method)


def _table(rows: Rows) -> Table:
    plain = [r for r in rows if r.get("gamma", 0.9) == 0.9 and r.get("utility") != "saliency"]
    lines: list[list[str | Cell]] = []
    for method, some in by_method(plain).items():
        for ratio, size, auc in sorted(some):
            seeds = sum(r["method"] == method and r["ratio"] == ratio for r in plain)
            texts: Iterable[str] = (f"{ratio:.0%}", f"{size:.2f}", f"{auc:.4f}", f"{seeds}")
            lines.append([NAMES[method], *(Cell(text=text, number=True) for text in texts)])
    return Table(headers=["method", "weights pruned", "resident MB", "AUC", "seeds"], rows=lines)


def main(arguments: Sequence[str]) -> int:
    """Write the page; returns the exit code."""
    return page_command(__doc__, lambda folder: page(load(folder)), arguments)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
