"""A composition as a job: independent pieces as Ray tasks, one row an arm and seed, a page.

What is measured is in ``jobs/bench/compose``; here it gets a config, a cluster, a run directory
that keeps finished pieces (``--resume`` measures only what is missing) and a report.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Literal, TypeVar

from jobs.bench.pieces import Piece
from jobs.launcher import Job, JobContext, Summary
from raysys.config import config_to_dict
from raysys.errors import DataError
from raysys.report import Cell, Plot, Section, Table, new_figure, render_page, series_color

ConfigT = TypeVar("ConfigT")
Row = dict[str, Any]
REPORT, ROWS = "report.html", "rows"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """A column of the rows.

    Args:
        name: key in a row. heading: with the unit. digits: shown after the point.
        better: which way is better; empty where neither is.
    """

    name: str
    heading: str
    digits: int = 3
    better: Literal["higher", "lower", ""] = ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Composition(Generic[ConfigT]):
    """Several systems in one run, against the same without one of them.

    Args:
        name: as in ``raysys compose NAME``. title, problem: for people; ``problem`` is the help.
        config: its dataclass, with ``seed`` (the first) and ``seeds`` (how many).
        pieces: independent measurements of a config.
        rows: a piece's result as flat rows with ``arm``, ``seed``, ``data`` and the measures.
        measures: what tables and plots show, where the rows have them.
        notes: small print of the page.
    """

    name: str
    title: str
    problem: str
    config: type[ConfigT]
    pieces: Callable[[ConfigT], Sequence[Piece]]
    rows: Callable[[Any], Sequence[Row]]
    measures: Sequence[Measure]
    notes: Sequence[str] = ()

    def job(self) -> Job[ConfigT]:
        """The program."""
        run = functools.partial(run_composition, self)
        text = f"{self.title}.\n\n{self.problem}"
        return Job(name=f"compose {self.name}", config=self.config, run=run, description=text)


def run_composition(
    composition: Composition[ConfigT], config: ConfigT, context: JobContext
) -> Summary:
    """Measure what the run directory does not hold yet, then write rows, result and report.

    Raises:
        DataError: the nodes of the cluster do not see the same data sets.
    """
    pieces = composition.pieces(config)
    found = [row for result in _measured(pieces, context) for row in composition.rows(result)]
    data = sorted({row["data"] for row in found})
    if len(data) > 1:
        remedy = "Point RAYSYS_DATA at the same data on every node"
        raise DataError("data", f"nodes saw different ones: {'; '.join(data)}", remedy)
    if ROWS not in context.run.tables():  # a finished run that is resumed has them
        context.run.append_rows(ROWS, found)
    measures = [measure for measure in composition.measures if measure.name in found[0]]
    means = means_of(found, measures)
    result = {
        "composition": composition.name,
        "config": config_to_dict(config),
        "data": data[0],
        "seeds": sorted({row["seed"] for row in found}),
        "means": means,
        "rows": found,
    }
    context.run.write_json("result.json", result)
    lines = list(_lines(means, measures))
    section = _section(composition, measures, found, means)
    page = render_page(composition.title, composition.problem, [section], context.run.uri)
    context.run.storage.write(REPORT, page.encode())
    return Summary(lines=lines, report=REPORT)


def means_of(rows: Sequence[Row], measures: Sequence[Measure]) -> dict[str, dict[str, float]]:
    """Mean over seeds of every measure by arm, arms in the order of the rows."""
    arms = dict.fromkeys(row["arm"] for row in rows)
    return {
        arm: {
            measure.name: statistics.mean(row[measure.name] for row in rows if row["arm"] == arm)
            for measure in measures
        }
        for arm in arms
    }


def _measured(pieces: Sequence[Piece], context: JobContext) -> list[Any]:
    """Results in order; each is in the run directory before the next is waited for."""
    import ray

    found = {
        piece.file: context.run.read_json(f"pieces/{piece.file}")
        for piece in pieces
        if context.run.storage.exists(f"pieces/{piece.file}")
    }
    context.ray()
    task = ray.remote(num_cpus=1)(_call)
    with context.progress("pieces", total=len(pieces)) as advance:
        advance(len(found))
        missing = [piece for piece in pieces if piece.file not in found]
        waiting = {task.remote(piece.measure): piece.file for piece in missing}
        while waiting:
            (done,), _ = ray.wait(list(waiting))
            file = waiting.pop(done)
            found[file] = ray.get(done)
            context.run.write_json(f"pieces/{file}", found[file])
            advance(1)
    return [found[piece.file] for piece in pieces]


def _call(measure: Callable[[], Any]) -> Any:
    return measure()


def _lines(means: dict[str, dict[str, float]], measures: Sequence[Measure]) -> Iterator[str]:
    yield " | ".join(["arm", *(measure.heading for measure in measures)])
    for arm, values in means.items():
        yield " | ".join([arm, *(f"{values[m.name]:,.{m.digits}f}" for m in measures)])


def _section(
    composition: Composition[Any],
    measures: Sequence[Measure],
    rows: Sequence[Row],
    means: dict[str, dict[str, float]],
) -> Section:
    headers = [measure.heading for measure in measures]
    by_arm: list[list[str | Cell]] = [
        [arm, *_cells(values, measures)] for arm, values in means.items()
    ]
    by_seed: list[list[str | Cell]] = [
        [row["arm"], str(row["seed"]), *_cells(row, measures)] for row in rows
    ]
    return Section(
        title="Measured",
        tables=[
            Table(headers=["arm", *headers], rows=by_arm, caption="means over seeds"),
            Table(headers=["arm", "seed", *headers], rows=by_seed, caption="every run"),
        ],
        plots=[_plot(rows, list(means), measure) for measure in measures],
        notes=composition.notes,
        command=f"raysys compose {composition.name}",
    )


def _cells(values: Row, measures: Sequence[Measure]) -> list[Cell]:
    return [Cell(text=f"{values[m.name]:,.{m.digits}f}", number=True) for m in measures]


def _plot(rows: Sequence[Row], arms: Sequence[str], measure: Measure) -> Plot:
    """A line an arm: its seeds as points, their mean as a bar across."""
    figure, axes = new_figure(height=1.2 + 0.4 * len(arms))
    for place, arm in enumerate(arms):
        values = [row[measure.name] for row in rows if row["arm"] == arm]
        color = series_color(place)
        axes.plot(values, [place] * len(values), marker="o", linestyle="", color=color)
        axes.plot([statistics.mean(values)], [place], marker="|", markersize=18, color=color)
    axes.set_yticks(range(len(arms)), arms)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_xlabel(measure.heading)
    better = f"; {measure.better} is better" if measure.better else ""
    caption = f"a point is a seed, the bar their mean{better}"
    return Plot(title=measure.heading, caption=caption, figure=figure)
