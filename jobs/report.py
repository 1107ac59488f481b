"""Write or find the HTML report of a run directory.

    raysys report RUN [--out FILE]

A job that writes a report of its own keeps it; for any other run this builds one from the
manifest, the metrics and the events.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raysys.errors import RaysysError
from raysys.report import Plot, Section, Table, new_figure, render_page
from raysys.runs import RunDirectory
from raysys.runs.storage import Storage

REPORT = "report.html"
LAST_EVENTS = 50


def main(arguments: Sequence[str] | None = None) -> int:
    """Print where the report is; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="raysys report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="run directory: a local path or a URI")
    parser.add_argument("--out", metavar="FILE", help="write a copy here")
    options = parser.parse_args(arguments)
    try:
        run = RunDirectory.open(options.run)
        if not run.storage.exists(REPORT):
            run.storage.write(REPORT, build(run).encode())
        where = f"{run.uri.rstrip('/')}/{REPORT}"
        if options.out:
            path = Path(options.out).absolute()
            Storage(str(path.parent)).write(path.name, run.storage.read(REPORT))
            where = str(path)
    except RaysysError as error:
        print(f"raysys: error: {error}", file=sys.stderr)
        return error.exit_code
    print(where)
    return 0


def build(run: RunDirectory) -> str:
    """Build a page from what every run holds: manifest, metrics, events."""
    manifest = run.manifest
    tables = run.tables()
    sections = [Section(title="Run", tables=[_manifest_table(run)])]
    if "metrics" in tables:
        sections.append(Section(title="Metrics", plots=_plots(run.read_table("metrics"))))
    if "events" in tables:
        sections.append(Section(title="Events", tables=[_event_table(run)]))
    lead = f"{manifest.status}, started {manifest.started_at}"
    return render_page(f"raysys {manifest.job}", lead, sections, f"{run.uri}")


def _manifest_table(run: RunDirectory) -> Table:
    manifest = run.manifest
    rows = [["status", manifest.status], ["started", manifest.started_at]]
    rows += [["ended", manifest.ended_at or ""], ["error", manifest.error or ""]]
    rows += [["seeds", ", ".join(map(str, manifest.seeds))]]
    rows += [[f"config {key}", str(value)] for key, value in manifest.config.items()]
    rows += [[f"host {key}", str(value)] for key, value in manifest.host.items()]
    return Table(headers=["field", "value"], rows=[row for row in rows if row[1]])


def _plots(metrics: Any) -> list[Plot]:
    series: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    start: float | None = None
    for row in metrics.to_pylist():
        start = row["time"] if start is None else start
        position = row["time"] - start if row["step"] is None else row["step"]
        series[row["name"]][row["tags"]].append((position, row["value"]))
    return [_plot(name, lines) for name, lines in sorted(series.items())]


def _plot(name: str, lines: dict[str, list[tuple[float, float]]]) -> Plot:
    figure, axes = new_figure()
    for label, points in sorted(lines.items()):
        marker = "o" if len(points) == 1 else None
        axes.plot(*zip(*points), label=label or None, marker=marker)
    axes.set_xlabel("step, or seconds since the first value")
    axes.set_ylabel(name)
    if any(lines):
        axes.legend()
    return Plot(title=name, caption=f"{sum(map(len, lines.values()))} values", figure=figure)


def _event_table(run: RunDirectory) -> Table:
    events = run.read_table("events").to_pylist()[-LAST_EVENTS:]
    rows = [[f"{event['time']:.1f}", event["kind"], event["detail"]] for event in events]
    return Table(headers=["time (s)", "kind", "detail"], rows=rows, caption="the last events")


if __name__ == "__main__":
    raise SystemExit(main())
