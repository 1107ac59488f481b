"""Select a coreset from score files: exact, seeded, the same for any number of partitions."""

from __future__ import annotations

import dataclasses
from typing import Any

from actors.ccs import Columns, auto_beta, select_parquet
from jobs.coreset.source import SourceConfig
from jobs.launcher import Job, JobContext, Summary
from raysys.config import check, check_range
from raysys.errors import ConfigError
from raysys.training.ccs.auto_beta import AutoBetaConfig
from raysys.training.ccs.coreset import save_coreset
from raysys.training.ccs.proxy import ProxyConfig
from raysys.training.ccs.selection import (
    Edges,
    Selection,
    SelectionConfig,
    coreset_size,
    default_beta,
)
from raysys.training.ccs.store import file_digest, read_scores

CORESET = "coreset"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SelectConfig:
    """A selection.

    Args:
        scores: Parquet files with an id and score columns.
        alpha: share to prune; or ``m``: examples to keep (one of the two).
        beta: share of the hardest to cut; ``auto`` cross-validates it (needs ``data``); by default
            ``clip(0.35 (alpha - 0.5), 0, 0.3)``, which suits clean labels.
        score, cutoff: what is stratified, and what the cutoff ranks by.
        id, label: column names; an empty label selects without classes.
        strata, edges, class_balanced, min_per_class, relax_beta, seed: see ``docs/ccs.md``.
        partitions: Ray tasks per pass over the rows.
        weights: write weights for an unbiased objective.
        data, proxy, search: for ``beta=auto``.
        dry_run: show what would be kept, and write no coreset.
    """

    scores: tuple[str, ...] = ()
    alpha: float | None = None
    m: int | None = None
    beta: float | str | None = None
    score: str = "aum"
    cutoff: str = "aum"
    id: str = "id"
    label: str = "label"
    strata: int = 50
    edges: Edges = "width"
    class_balanced: bool = False
    min_per_class: int = 0
    relax_beta: bool = False
    seed: int = 0
    partitions: int = 8
    weights: bool = False
    data: SourceConfig | None = None
    proxy: ProxyConfig = dataclasses.field(default_factory=ProxyConfig)
    search: AutoBetaConfig = dataclasses.field(default_factory=AutoBetaConfig)
    dry_run: bool = False

    def __post_init__(self) -> None:
        check(self, "scores", len(self.scores) > 0, "at least one Parquet file of scores")
        one = (self.alpha is None) != (self.m is None)
        check(self, "alpha", one, "either alpha or m", "Set one of the two")
        if self.alpha is not None:
            check_range(self, "alpha", 0, 1)
        known = self.beta is None or self.beta == "auto" or not isinstance(self.beta, str)
        check(self, "beta", known, "a number in [0, 1), or auto")
        needs_data = self.beta != "auto" or self.data is not None
        check(self, "beta", needs_data, "data to try candidates on", "Set data.name")
        check_range(self, "partitions", 1)

    def selection(self, beta: float) -> SelectionConfig:
        """The core's configuration."""
        return SelectionConfig(
            beta=beta, strata=self.strata, seed=self.seed, edges=self.edges,
            class_balanced=self.class_balanced, min_per_class=self.min_per_class,
            relax_beta=self.relax_beta,
        )  # fmt: skip


def run(config: SelectConfig, context: JobContext) -> Summary:
    """Choose beta if asked, select, write the coreset with its manifest."""
    context.ray()
    columns = Columns(
        score=config.score, cutoff=config.cutoff, id=config.id, label=config.label or None
    )
    rows = _rows(config.scores)
    m = config.m if config.m is not None else coreset_size(rows, config.alpha or 0.0)
    extra: dict[str, Any] = {
        "score": config.score,
        "cutoff": config.cutoff,
        "score_files": {path: file_digest(path) for path in config.scores},
    }
    if config.beta == "auto":
        beta = _search(config, m, extra)
    elif config.beta is None:
        beta = default_beta(1 - m / rows)
    else:
        beta = float(config.beta)
    chosen = config.selection(beta)
    with context.progress("selecting", total=1) as advance:
        selection = select_parquet(config.scores, m, chosen, columns, partitions=config.partitions)
        advance(1)
    lines = describe(selection)
    context.run.write_json("result.json", {"m": m, "beta": beta, **_facts(selection), **extra})
    if not config.dry_run:
        folder = f"{context.run.uri}/{CORESET}"
        save_coreset(folder, selection, chosen, weights=config.weights, extra=extra)
        lines.append(f"coreset: {folder}")
    return Summary(lines=lines)


def describe(selection: Selection) -> list[str]:
    """The selection in a few lines."""
    used = int((selection.quotas > 0).sum())
    exhausted = int(((selection.quotas == selection.sizes) & (selection.sizes > 0)).sum())
    lines = [
        f"{len(selection.ids)} of {selection.rows} examples kept, beta {selection.beta:.4g}",
        f"{used} of {len(selection.sizes)} strata used, {exhausted} kept whole",
    ]
    if len(selection.classes_after):
        lines.append(
            f"classes: {selection.classes_after.tolist()} of {selection.classes_before.tolist()}"
        )
    return lines + [f"warning: {text}" for text in selection.warnings]


def _facts(selection: Selection) -> dict[str, Any]:
    return {
        "fingerprint": selection.fingerprint,
        "sizes": selection.sizes.tolist(),
        "quotas": selection.quotas.tolist(),
        "warnings": list(selection.warnings),
    }


def _search(config: SelectConfig, m: int, extra: dict[str, Any]) -> float:
    if len(config.scores) != 1 or config.data is None:
        raise ConfigError("scores", config.scores, "one file with beta=auto", "Merge the files")
    table = read_scores(config.scores[0])
    train = config.data.load().train
    choice = auto_beta(
        train, table, m, config.proxy, config.search, config.selection(0.0), score=config.score
    )
    extra["auto_beta"] = {
        "beta": choice.beta,
        "plateau": list(choice.plateau),
        "held_out_accuracy": {str(key): value for key, value in choice.accuracy.items()},
    }
    return choice.beta


def _rows(paths: tuple[str, ...]) -> int:
    from actors.ccs.selection import count_rows

    return count_rows(paths)


JOB = Job(name="coreset select", config=SelectConfig, run=run)
