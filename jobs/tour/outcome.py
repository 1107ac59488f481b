"""What became of each stage, and how the table and the report show it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table as ConsoleTable

from jobs.tour.stage import Row, Stage, StageResult
from raysys.report import Cell, Section, Table, render_page
from raysys.report.page import Tone

HEADERS = ("what was measured", "baseline", "ours", "ours / baseline")
EVEN = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """A stage with its result, or with the reason why there is none."""

    stage: Stage
    duration_s: float
    result: StageResult | None = None
    missing: str = ""
    failure: str = ""

    @property
    def state(self) -> str:
        """One of ``ran``, ``cannot run here``, ``failed``."""
        if self.result is not None:
            return "ran"
        return "cannot run here" if self.missing else "failed"

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``tour.json``."""
        rows = [] if self.result is None else self.result.rows
        return {
            "stage": self.stage.name,
            "state": self.state,
            "reason": self.missing or self.failure,
            "duration_s": round(self.duration_s, 2),
            "rows": [dataclasses.asdict(row) | {"ratio": row.ratio} for row in rows],
            "notes": [] if self.result is None else list(self.result.notes),
        }


def console_table(outcomes: Sequence[Outcome]) -> ConsoleTable:
    """The table that the tour prints; an arrow tells which direction is better."""
    table = ConsoleTable(title="raysys tour", title_justify="left")
    for header in ("system", "what was measured", "baseline", "ours", "ratio"):
        table.add_column(header, justify="right" if header in ("ours", "ratio") else "left")
    for outcome in outcomes:
        if outcome.result is None:
            table.add_row(outcome.stage.title, outcome.state)
        for number, row in enumerate(outcome.result.rows if outcome.result else ()):
            measure, baseline, ours, ratio = _texts(row)
            title = "" if number else outcome.stage.title
            table.add_row(title, escape(measure), baseline, ours, ratio)
        table.add_section()
    return table


def render_report(outcomes: Sequence[Outcome], lead: str, footer: str) -> str:
    """The HTML page: a figure of each stage, then a section a stage."""
    overview = Section(
        title="At a glance",
        lead="One figure of each system (↑ higher, ↓ lower is better); its section below has "
        "all of them, a plot, and the command that runs the system for real.",
        tables=[_overview(outcomes)],
    )
    return render_page(
        "raysys tour", lead, [overview, *(_section(outcome) for outcome in outcomes)], footer
    )


def _overview(outcomes: Sequence[Outcome]) -> Table:
    rows: list[list[str | Cell]] = []
    for outcome in outcomes:
        if outcome.result is None:
            reason = outcome.missing or outcome.failure
            rows.append([outcome.stage.title, Cell(text=reason, tone="muted"), "", "", ""])
        else:
            row = outcome.result.rows[outcome.result.headline]
            rows.append([outcome.stage.title, *_cells(row)])
    return Table(headers=("system", *HEADERS), rows=rows)


def _section(outcome: Outcome) -> Section:
    stage, result = outcome.stage, outcome.result
    if result is None:
        return Section(
            title=stage.title,
            lead=stage.problem,
            warning=f"{outcome.state}: {outcome.missing or outcome.failure}",
            command=stage.command,
        )
    return Section(
        title=stage.title,
        lead=stage.problem,
        tables=[Table(headers=HEADERS, rows=[_cells(row) for row in result.rows])],
        plots=result.plots,
        notes=[*result.notes, f"The stage took {outcome.duration_s:.0f} s."],
        command=stage.command,
    )


def _texts(row: Row) -> tuple[str, str, str, str]:
    measure = f"{row.measure} [{row.unit}] {'↑' if row.better == 'higher' else '↓'}"
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    baseline = f"{_number(row.baseline)} ({row.baseline_name})"
    return measure, baseline, _number(row.ours), ratio


def _cells(row: Row) -> list[str | Cell]:
    measure, baseline, ours, ratio = _texts(row)
    return [
        measure,
        Cell(text=baseline),
        Cell(text=ours, number=True),
        Cell(text=ratio, number=True, tone=_tone(row)),
    ]


def _tone(row: Row) -> Tone:
    """Colour of a ratio: none within two per cent, which repeats on a shared machine differ by."""
    if abs(row.ours - row.baseline) <= EVEN * abs(row.baseline):
        return ""
    return "good" if (row.ours > row.baseline) == (row.better == "higher") else "bad"


def _number(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
