"""Exact coverage-centric coreset selection (CCS, Zheng et al., ICLR 2023, Algorithm 1).

Cut the ``beta`` hardest, split the remaining score range into strata, share the budget over them
by water-filling, and take each stratum's smallest keyed hashes. Everything is asked of the rows
through mergeable passes, so the caller decides where they lie: in memory or in many partitions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from raysys.config import check, check_choice, check_range
from raysys.errors import ConfigError, InfeasibleError
from raysys.training.ccs import blocks
from raysys.training.ccs.blocks import Block, Cut, Sample
from raysys.training.ccs.edges import AnswerT, MapBlocks, add_padded, make_strata, sum_counts
from raysys.training.ccs.strata import Strata, allocate, class_budgets
from raysys.training.ccs.table import ScoreTable, duplicates, format_fingerprint

BOUNDARY_ROWS = 1_000_000  # a boundary bin of at most this many rows is sorted on the driver
Edges = Literal["width", "quantile"]


def default_beta(alpha: float) -> float:
    """Cutoff rate for clean data when none is given: clip(0.35 (alpha - 0.5), 0, 0.3)."""
    return min(0.3, max(0.0, 0.35 * (alpha - 0.5)))


def coreset_size(rows: int, alpha: float) -> int:
    """Coreset size for a pruning rate: ``round((1 - alpha) rows)``.

    Raises:
        ConfigError: ``alpha`` is outside [0, 1], or nothing would be left.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError("alpha", alpha, "a pruning rate in [0, 1]")
    size = round((1 - alpha) * rows)
    if size < 1:
        raise ConfigError("alpha", alpha, f"a pruning rate that keeps one of {rows} examples")
    return size


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SelectionConfig:
    """Parameters of a selection.

    Args:
        beta: share of all examples to cut, hardest first; in [0, 1).
        strata: number of strata per group.
        seed: seed of the keyed hash.
        edges: strata of equal width (the paper) or of equal population.
        class_balanced: strata and budgets per class, budgets proportional to class frequency.
        min_per_class: least examples per class (with ``class_balanced``).
        relax_beta: lower ``beta`` where the budget exceeds what it would leave.
    """

    beta: float = 0.0
    strata: int = 50
    seed: int = 0
    edges: Edges = "width"
    class_balanced: bool = False
    min_per_class: int = 0
    relax_beta: bool = False

    def __post_init__(self) -> None:
        check_range(self, "beta", 0, 1, high_open=True)
        check_range(self, "strata", 1)
        check_choice(self, "edges", ("width", "quantile"))
        check_range(self, "min_per_class", 0)
        needs = self.min_per_class == 0 or self.class_balanced
        check(self, "min_per_class", needs, "0 without class_balanced", "Set class_balanced=true")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """A coreset and how it came about; columns are ordered by id.

    Args:
        sample: ids (int64, ascending) with score, hardness, stratum and hash.
        sizes, quotas: members and budget of each stratum, int64, groups one after the other.
        strata: the edges of each group.
        cut: the last example that was cut.
        rows, beta, fingerprint: of the whole data set; ``beta`` as applied.
        classes_before, classes_after: class histograms (empty without labels).
        warnings: what the user should know, in words.
    """

    sample: Sample
    sizes: NDArray[np.int64]
    quotas: NDArray[np.int64]
    strata: tuple[Strata, ...]
    cut: Cut
    rows: int
    beta: float
    fingerprint: str
    classes_before: NDArray[np.int64]
    classes_after: NDArray[np.int64]
    warnings: tuple[str, ...]

    @property
    def ids(self) -> NDArray[np.int64]:
        return self.sample.ids

    def weights(self) -> NDArray[np.float64]:
        """Stratum size over quota: weights of an unbiased objective over the survivors."""
        ratio = self.sizes / np.maximum(self.quotas, 1)
        weights: NDArray[np.float64] = ratio[self.sample.stratum]
        return weights


def select_ccs(
    table: ScoreTable,
    m: int,
    config: SelectionConfig | None = None,
    *,
    score: str = "aum",
    cutoff: str = "aum",
) -> Selection:
    """Select ``m`` examples of a table in memory.

    Args:
        score: the score that is stratified.
        cutoff: the score that the cutoff ranks by (AUM whatever is stratified, as the paper's
            code does).

    Raises:
        ConfigError, InfeasibleError: as :func:`run_selection`.
    """
    block = Block(table.ids, table.score(score), table.hardness(cutoff), table.labels)

    def map_blocks(function: Callable[[Block], AnswerT], /) -> Iterable[AnswerT]:
        return [function(block)]

    return run_selection(map_blocks, m, config or SelectionConfig())


def run_selection(map_blocks: MapBlocks, m: int, config: SelectionConfig) -> Selection:
    """Select ``m`` examples from blocks of rows; the result does not depend on the blocks.

    Raises:
        ConfigError: ``m`` is not an integer in [1, N], bad ids, scores or labels.
        InfeasibleError: ``m`` exceeds what the cutoff leaves and ``relax_beta`` is off.
    """
    if isinstance(m, bool) or not isinstance(m, int | np.integer) or m < 1:
        raise ConfigError("m", m, "a whole number of examples >= 1")
    survey, unique_ids = _survey(map_blocks, config.class_balanced)
    _check_unique(unique_ids)
    if m > survey.rows:
        raise ConfigError("m", m, f"at most the {survey.rows} examples there are")
    n_cut, warnings = _cut_count(survey.rows, int(m), config)
    cut = _find_cut(map_blocks, survey.digits, n_cut)
    groups = len(survey.classes) if config.class_balanced else 1
    strata = make_strata(
        map_blocks, cut, groups, config.strata, config.edges, config.class_balanced
    )
    count = blocks.CountPass(cut, strata, config.class_balanced)
    sizes = sum_counts(map_blocks(count))
    quotas = _quotas(sizes, strata, survey.classes, int(m), config)
    sample = _draw(map_blocks, cut, strata, sizes, quotas, config)
    sample = sample.take(np.argsort(sample.ids, kind="stable"))
    after = _class_counts(map_blocks, sample.ids, survey.classes)
    warnings += _advice(sizes, strata, survey.classes, after, config)
    return Selection(
        sample, sizes, quotas, strata, cut, survey.rows, n_cut / survey.rows,
        format_fingerprint(survey.rows, survey.digest), survey.classes, after, tuple(warnings),
    )  # fmt: skip


def _survey(map_blocks: MapBlocks, grouped: bool) -> tuple[blocks.Survey, list[NDArray[np.int64]]]:
    rows, digest = 0, 0
    classes = np.zeros(0, np.int64)
    digits = np.zeros(1 << blocks.DIGIT_BITS, np.int64)
    ids = []
    for part in map_blocks(blocks.SurveyPass(grouped)):
        rows, digest = rows + part.rows, (digest + part.digest) % 2**64
        classes = add_padded(classes, part.classes)
        digits += part.digits
        ids.append(part.ids)
    if rows == 0:
        raise ConfigError("rows", 0, "at least one example")
    return blocks.Survey(rows, digest, classes, digits, ids[0]), ids


def _check_unique(parts: Sequence[NDArray[np.int64]]) -> None:
    """Check ids across blocks: by a bit map where they are dense, else by sorting."""
    parts = [part for part in parts if len(part)]
    total = sum(len(part) for part in parts)
    low = min(int(part.min()) for part in parts)
    span = max(int(part.max()) for part in parts) - low + 1
    if span <= 16 * total:
        seen = np.zeros(span, np.bool_)
        for part in parts:
            seen[part - low] = True
        if int(np.count_nonzero(seen)) == total:
            return
    repeated = duplicates(np.concatenate(parts))
    if len(repeated):
        remedy = "Each example needs an id of its own"
        raise ConfigError("ids", repeated[:5].tolist(), "unique ids", remedy)


def _cut_count(rows: int, m: int, config: SelectionConfig) -> tuple[int, list[str]]:
    n_cut = math.floor(config.beta * rows + 1e-9)
    left = rows - n_cut
    if m <= left:
        return n_cut, []
    if not config.relax_beta:
        reason = f"beta={config.beta:g} leaves {left} of {rows}"
        remedy = f"Use beta <= {1 - m / rows:.4g} or relax_beta=true"
        raise InfeasibleError(f"a coreset of {m}", reason, remedy)
    return rows - m, [f"beta lowered from {config.beta:g} to {(rows - m) / rows:.4g}"]


def _find_cut(map_blocks: MapBlocks, digits: NDArray[np.int64], n_cut: int) -> Cut:
    """Find the ``n_cut``-th example in (hardness descending, id ascending), exactly.

    A radix search over 16-bit digits of the 128-bit (key, id): it ends after at most eight
    histograms whatever the distribution, where linear bins stall on an outlier.
    """
    if n_cut == 0:
        return Cut()
    prefix: tuple[int, ...] = ()
    wanted = n_cut  # rank, from 1, within the rows that match the prefix
    while True:
        below = np.cumsum(digits)
        digit = int(np.searchsorted(below, wanted))
        wanted -= int(below[digit - 1]) if digit else 0
        prefix = (*prefix, digit)
        if int(digits[digit]) <= BOUNDARY_ROWS or len(prefix) == 2 * blocks.DIGITS_PER_WORD:
            break
        digits = sum_counts(map_blocks(blocks.DigitPass(prefix)))
    found = list(map_blocks(blocks.BoundaryPass(prefix)))
    keys = np.concatenate([part[0] for part in found])
    ids = np.concatenate([part[1] for part in found])
    row = np.lexsort((ids, keys))[wanted - 1]
    return Cut(int(keys[row]), int(ids[row]))


def _quotas(
    sizes: NDArray[np.int64],
    strata: tuple[Strata, ...],
    frequency: NDArray[np.int64],
    m: int,
    config: SelectionConfig,
) -> NDArray[np.int64]:
    if not config.class_balanced:
        return allocate(sizes, m)
    parts = np.split(sizes, np.cumsum([part.count for part in strata])[:-1])
    available = np.asarray([int(part.sum()) for part in parts], np.int64)
    budgets = class_budgets(frequency, available, m, config.min_per_class)
    return np.concatenate([allocate(part, int(b)) for part, b in zip(parts, budgets)])


def _draw(
    map_blocks: MapBlocks,
    cut: Cut,
    strata: tuple[Strata, ...],
    sizes: NDArray[np.int64],
    quotas: NDArray[np.int64],
    config: SelectionConfig,
) -> Sample:
    """Merge the blocks' bottom-q lists; a hash ceiling spares sorting rows that cannot win."""
    share = (quotas + 8 * np.sqrt(quotas) + 32) / np.maximum(sizes, 1)
    ceiling = _as_ceiling(share)
    while True:
        ask = blocks.SamplePass(cut, strata, config.class_balanced, quotas, ceiling, config.seed)
        merged = Sample.merge(list(map_blocks(ask))).bottom(quotas)
        got = np.bincount(merged.stratum, minlength=len(quotas))
        if bool((got == quotas).all()):
            return merged
        ceiling = np.where(got < quotas, np.uint64(blocks.ALL_ONES), ceiling)


def _as_ceiling(share: NDArray[np.float64]) -> NDArray[np.uint64]:
    capped = np.minimum(share, 0.999)
    scaled = (capped * 2.0**53).astype(np.uint64) << np.uint64(11)
    ceiling: NDArray[np.uint64] = np.where(share >= 0.999, np.uint64(blocks.ALL_ONES), scaled)
    return ceiling


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _MemberPass:
    """Class counts of the rows whose ids were kept."""

    kept: NDArray[np.int64]

    def __call__(self, block: Block) -> NDArray[np.int64]:
        if block.labels is None:
            return np.zeros(0, np.int64)
        at = np.minimum(np.searchsorted(self.kept, block.ids), len(self.kept) - 1)
        return np.bincount(block.labels[self.kept[at] == block.ids])


def _class_counts(
    map_blocks: MapBlocks, kept: NDArray[np.int64], before: NDArray[np.int64]
) -> NDArray[np.int64]:
    counts = np.zeros(len(before), np.int64)
    if len(before):
        for part in map_blocks(_MemberPass(kept)):
            counts = add_padded(counts, part)
    return counts


def _advice(
    sizes: NDArray[np.int64],
    strata: tuple[Strata, ...],
    before: NDArray[np.int64],
    after: NDArray[np.int64],
    config: SelectionConfig,
) -> list[str]:
    warnings = []
    empty, total = int((sizes == 0).sum()), len(sizes)
    if config.edges == "width" and total >= 10 and empty > 0.9 * total:
        warnings.append(
            f"{empty} of {total} strata are empty (an outlier stretches the score range): "
            "use edges=quantile"
        )
    if sum(part.count for part in strata) > int(sizes.sum()):
        warnings.append(f"fewer examples ({int(sizes.sum())}) than strata ({total})")
    gone = np.flatnonzero((before > 0) & (after == 0)).tolist()
    if gone:
        warnings.append(
            f"classes {gone} vanish from the coreset: use class_balanced, min_per_class"
        )
    return warnings
