"""Report on a coreset: kept strata, classes, coverage, and (if asked) accuracy against random."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.ccs import coverage_tasks, row_finder, train_many
from jobs.coreset.source import SourceConfig
from jobs.launcher import Job, JobContext, Summary
from raysys.config import check, check_range
from raysys.errors import DataError
from raysys.report import Plot, Section, Table, new_figure, render_page, series_color
from raysys.report.figures import INK
from raysys.training.ccs.baselines import HardestFirst, Random
from raysys.training.ccs.coreset import Coreset
from raysys.training.ccs.proxy import ProxyConfig
from raysys.training.ccs.store import read_scores, split
from raysys.training.ccs.table import ScoreTable

REPORT = "report.html"
_ROUNDING = 1e-6  # of a stratum's width


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """A report.

    Args:
        coreset: folder of the coreset. scores: the file it was selected from.
        features: ``features.npz`` of the scoring run, for AUC_pr; empty leaves coverage out.
        data: given, proxies train on the coreset, on random and on the hardest examples.
        proxy: their recipe. seeds: proxies per method.
    """

    coreset: str = ""
    scores: str = ""
    features: str = ""
    data: SourceConfig | None = None
    proxy: ProxyConfig = dataclasses.field(default_factory=ProxyConfig)
    seeds: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        check(self, "coreset", bool(self.coreset), "the folder of a coreset")
        check(self, "scores", bool(self.scores), "the score file of the coreset")
        check_range(self, "seeds", 1)


def run(config: ReportConfig, context: JobContext) -> Summary:
    """Check that scores and coreset belong together, measure, draw, write the page."""
    coreset = Coreset.load(config.coreset)
    table = read_scores(config.scores)
    coreset.verify(table.ids, table.labels)
    result: dict[str, Any] = {"m": len(coreset.ids), "rows": len(table)}
    lines = [f"{len(coreset.ids)} of {len(table)} examples, beta {coreset.manifest['beta']:.4g}"]
    if config.features:
        context.ray()
        result["auc_pr"] = _coverage(config, table, coreset)
        lines.append(_line("AUC_pr (lower covers better)", result["auc_pr"], ".4g"))
    if config.data is not None:
        context.ray()
        result["accuracy"] = _accuracy(config, table, coreset)
        lines.append(_line("test accuracy", result["accuracy"], ".4f"))
    score = str(coreset.manifest.get("score", "aum"))
    edges = strata_edges(coreset.manifest)
    plot = kept_plot(table, {"coreset": coreset.ids}, score, edges)
    sections = [
        Section(title="What was kept", plots=[plot]),
        Section(title="Figures", tables=[_table(result)]),
    ]
    context.run.write_json("result.json", result)
    page = render_page("Coreset report", " ".join(lines), sections)
    context.run.storage.write(REPORT, page.encode())
    return Summary(lines=lines, report=REPORT)


def kept_plot(
    table: ScoreTable,
    kept: dict[str, Any],
    score: str = "aum",
    edges: Sequence[float] = (),
) -> Plot:
    """Histogram of a score over all examples and over what each selection keeps.

    Args:
        edges: inner edges of equal-width strata; without them the bars are a fiftieth of the range.
    """
    figure, axes = new_figure()
    values = table.score(score)
    bins = _bins(values, edges)
    # The distribution is a line in the text's colour, so that it shows beside any filled series.
    axes.hist(values, bins=bins, histtype="step", color=INK, label=f"all {len(values)}")
    for index, (name, ids) in enumerate(kept.items()):
        color = series_color(index)
        axes.hist(values[table.rows_of(ids)], bins=bins, color=color, alpha=0.55, label=name)
    axes.set_yscale("log")
    axes.set_xlabel(f"{score} (one bar per stratum)" if len(edges) else score)
    axes.set_ylabel("examples")
    axes.legend()
    return Plot(
        title="Score distribution and what is kept",
        caption="CCS keeps sparse strata nearly whole, thins dense ones, and drops the hardest.",
        figure=figure,
    )


def _bins(values: NDArray[np.float64], edges: Sequence[float]) -> NDArray[np.float64]:
    """The strata's edges, carried on at the same width over what the cutoff removed."""
    low, high = float(values.min()), float(values.max())
    if len(edges) < 2:
        return np.linspace(low, high + 1e-12, 51)
    width = float(edges[1] - edges[0])
    below = math.ceil((edges[0] - low) / width - _ROUNDING)
    above = math.ceil((high - edges[-1]) / width - _ROUNDING)
    steps = np.arange(-below, len(edges) + above)
    bins = np.interp(steps, np.arange(len(edges)), edges)
    bins = np.where(steps < 0, edges[0] + steps * width, bins)
    bins = np.where(steps >= len(edges), edges[-1] + (steps - len(edges) + 1) * width, bins)
    return np.concatenate([[min(low, bins[0])], bins[1:-1], [max(high, bins[-1])]])


def strata_edges(manifest: Mapping[str, Any]) -> Sequence[float]:
    """Inner edges where all examples share one set of equal-width strata; else none."""
    groups = manifest["strata"]["edges"]
    plain = len(groups) == 1 and manifest["config"]["edges"] == "width"
    return groups[0] if plain else ()


def _coverage(config: ReportConfig, table: ScoreTable, coreset: Coreset) -> dict[str, float]:
    storage, name = split(config.features)
    try:
        with np.load(io.BytesIO(storage.read(name)), allow_pickle=False) as file:
            ids, features, targets = file["ids"], file["features"], file["test_features"]
    except (ValueError, KeyError, OSError) as error:
        reason = f"not a scoring run's features ({error})"
        raise DataError(config.features, reason, "Give features.npz") from None
    find = row_finder(ids)
    return {
        key: coverage_tasks(features[find(kept)], targets).auc_pr
        for key, kept in _selections(table, coreset, config.seed).items()
    }


def _accuracy(config: ReportConfig, table: ScoreTable, coreset: Coreset) -> dict[str, float]:
    assert config.data is not None
    data = config.data.load()
    coreset.verify(data.train.ids, data.train.y)
    find = row_finder(data.train.ids)
    kept = _selections(table, coreset, config.seed)
    seeds = range(config.seed, config.seed + config.seeds)
    subsets = [find(ids) for ids in kept.values() for _ in seeds]
    found = train_many(
        data.train, subsets, [*seeds] * len(kept), data.test, config.proxy, stack=config.seeds
    )
    means = np.asarray(found).reshape(len(kept), config.seeds).mean(1)
    return {key: float(value) for key, value in zip(kept, means)}


def _selections(table: ScoreTable, coreset: Coreset, seed: int) -> dict[str, Any]:
    m = len(coreset.ids)
    return {
        "coreset": coreset.ids,
        "random": Random().select(table, m, seed),
        "hardest": HardestFirst("aum").select(table, m, seed),
    }


def _line(what: str, values: dict[str, float], spec: str) -> str:
    return f"{what}: " + ", ".join(f"{key} {value:{spec}}" for key, value in values.items())


def _table(result: dict[str, Any]) -> Table:
    rows: list[Sequence[str]] = [["examples kept", str(result["m"]), "", ""]]
    rows += [
        [key, *(f"{value:.4g}" for value in result[key].values())]
        for key in ("auc_pr", "accuracy")
        if key in result
    ]
    return Table(headers=["measure", "coreset", "random", "hardest by AUM"], rows=rows)


JOB = Job(name="coreset report", config=ReportConfig, run=run)
