"""Pages from kept pieces: accuracy against CPU time for all methods, and what froze when.

    python -m jobs.bench.kgt.figures FOLDER PAGE.html

FOLDER is the ``--partial`` folder of a benchmark run; nothing is measured here.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.bench.kgt.tasks import CURVE_ROWS
from jobs.bench.pieces import page_command
from raysys.errors import DataError
from raysys.report import Cell, Plot, Section, Table, new_figure, render_page, series_color
from raysys.report.figures import INK

Rows = list[dict[str, Any]]
_LINES = ("-", "--", "-.", ":")


def load(folder: str) -> dict[str, Rows]:
    """Rows of all runs by task; a run that was measured in several pieces appears once.

    Raises:
        DataError: the folder holds no runs.
    """
    found: dict[str, dict[tuple[str, int], dict[str, Any]]] = {}
    for path in sorted(Path(folder).glob("*.json")):
        piece = json.loads(path.read_text(encoding="utf-8"))
        if not {"task", "seed"} <= piece["key"].keys():
            continue  # a coreset's run, or how rivals were tuned
        vanilla = [row["cpu_s"] for row in piece["result"] if row["method"] == "vanilla"]
        for row in piece["result"]:
            ratio = row["cpu_s"] / vanilla[0] if vanilla else None
            key = (row["method"], row["seed"])
            known = found.setdefault(piece["key"]["task"], {}).get(key)
            if known is None or known["cpu_ratio"] is None:
                found[piece["key"]["task"]][key] = {**row, "cpu_ratio": ratio}
    if not found:
        raise DataError(folder, "holds no runs", "Run the benchmark with --partial FOLDER")
    return {task: list(rows.values()) for task, rows in found.items()}


def page(tasks: Mapping[str, Rows]) -> str:
    """The HTML page."""
    sections = [
        Section(
            title=task,
            tables=[_table(rows)],
            plots=[accuracy_plot(rows), *_schedules(rows)],
        )
        for task, rows in sorted(tasks.items())
    ]
    lead = "Every method trains from the same weights and data order; one torch thread."
    return render_page("Layer freezing: accuracy, CPU time and schedules", lead, sections)


def by_method(rows: Rows) -> dict[str, Rows]:
    """Rows of each method, in order of appearance."""
    found: dict[str, Rows] = {}
    for row in rows:
        found.setdefault(row["method"], []).append(row)
    return found


def _table(rows: Rows) -> Table:
    lines: list[list[str | Cell]] = []
    for method, some in by_method(rows).items():
        points = [100 * row["accuracy"] for row in some]
        spread = statistics.stdev(points) if len(points) > 1 else 0.0
        ratios = [row["cpu_ratio"] for row in some if row["cpu_ratio"] is not None]
        cells = (
            f"{statistics.fmean(points):.2f} ± {spread:.2f}",
            f"{statistics.fmean(row['cpu_s'] for row in some):.1f}",
            f"{statistics.median(ratios):.3f}" if ratios else "",
            f"{len(some)}",
        )
        lines.append([method, *(Cell(text=text, number=True) for text in cells)])
    headers = ["method", "test accuracy, %", "CPU seconds", "median of CPU / vanilla", "seeds"]
    return Table(headers=headers, rows=lines)


def accuracy_plot(rows: Rows) -> Plot:
    """Mean test accuracy over mean CPU seconds, one line per method."""
    figure, axes = new_figure(height=4.2)
    for index, (method, some) in enumerate(by_method(rows).items()):
        curves = [row["curve"] for row in some]
        length = min(len(curve) for curve in curves)
        seconds = [statistics.fmean(c[at][0] for c in curves) for at in range(length)]
        points = [100 * statistics.fmean(c[at][1] for c in curves) for at in range(length)]
        style = _LINES[index // 6 % len(_LINES)]
        color = series_color(index)
        axes.plot(seconds, points, style, color=color, label=method, linewidth=1.4)
        axes.plot(seconds[-1:], points[-1:], "o", color=color, markersize=5)
    best = max(100 * row["accuracy"] for row in rows)
    axes.set_ylim(best - 12, best + 0.5)
    axes.set_xlabel("CPU seconds")
    axes.set_ylabel("test accuracy, %")
    axes.legend(fontsize=8, ncols=2)
    caption = (
        "Means over seeds; the axis shows the last 12 points. The dot is the end of training, on "
        f"all test examples; points before it are on the first {CURVE_ROWS}, so the line may jump."
    )
    return Plot(title="Accuracy against CPU time", caption=caption, figure=figure)


def _schedules(rows: Rows) -> Sequence[Plot]:
    shown = {m: some for m, some in by_method(rows).items() if any(r["schedule"] for r in some)}
    return [schedule_plot(shown)] if shown else []


def schedule_plot(methods: Mapping[str, Rows]) -> Plot:
    """How many front modules each method held frozen along the run, one thin line per seed."""
    count = len(methods)
    figure, grid = new_figure(count, 1, height=1.1 * count + 0.7)
    for index, (axes, (method, rows)) in enumerate(
        zip([grid] if count == 1 else list(grid), methods.items())
    ):
        top = max(upto for row in rows for _, upto in row["schedule"] or [(0, 0)])
        for row in rows:
            steps, frozen = _staircase(row["schedule"], row["steps"])
            axes.plot(steps, frozen, color=series_color(index), linewidth=1, alpha=0.8)
        axes.set_ylim(-0.3, top + 0.6)
        axes.set_yticks(range(0, top + 1, 2))
        axes.set_title(method, loc="left", fontsize=9)
        if index < count - 1:
            axes.tick_params(labelbottom=False)
    axes.set_xlabel("optimizer step")
    figure.supylabel("frozen front modules", fontsize=10, color=INK)
    caption = (
        "A module freezes where a line rises above its number and trains again where it falls."
    )
    return Plot(title="Which module froze when", caption=caption, figure=figure)


def _staircase(schedule: Sequence[Sequence[int]], total: int) -> tuple[list[int], list[int]]:
    steps, frozen = [0], [0]
    for step, upto in schedule:
        steps += [step, step]
        frozen += [frozen[-1], upto]
    return [*steps, total], [*frozen, frozen[-1]]


def main(arguments: Sequence[str]) -> int:
    """Write the page; returns the exit code."""
    return page_command(__doc__, lambda folder: page(load(folder)), arguments)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
