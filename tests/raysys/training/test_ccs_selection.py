"""CCS selection: against a plain reference, for any partition, and at the edges."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.errors import ConfigError, InfeasibleError
from raysys.training.ccs import selection as selection_module
from raysys.training.ccs.blocks import Block
from raysys.training.ccs.hashing import keyed_hash
from raysys.training.ccs.selection import (
    SelectionConfig,
    coreset_size,
    default_beta,
    run_selection,
    select_ccs,
)
from raysys.training.ccs.strata import allocate
from raysys.training.ccs.table import ScoreTable


def make_table(rows: int, seed: int = 0, *, ties: bool = False, classes: int = 3) -> ScoreTable:
    rng = np.random.default_rng(seed)
    ids = rng.permutation(4 * rows)[:rows].astype(np.int64)
    aum = rng.normal(size=rows)
    if ties:
        aum = np.round(aum)
    return ScoreTable(
        ids, {"aum": aum, "el2n": rng.gamma(2.0, size=rows)}, rng.integers(0, classes, rows)
    )


def mapper(blocks: list[Block]) -> Any:
    def map_blocks(function: Callable[[Block], Any], /) -> Iterable[Any]:
        return [function(block) for block in blocks]

    return map_blocks


def cut_up(table: ScoreTable, parts: int, seed: int, score: str = "aum") -> list[Block]:
    order = np.random.default_rng(seed).permutation(len(table))
    pieces = [table.take(rows) for rows in np.array_split(order, parts) if len(rows)]
    return [Block(p.ids, p.score(score), p.hardness("aum"), p.labels) for p in pieces]


def reference(table: ScoreTable, m: int, beta: float, k: int, seed: int) -> np.ndarray:
    """The algorithm of the paper, row by row, in one place."""
    order = np.lexsort((table.ids, -table.hardness("aum")))
    pool = order[int(beta * len(table) + 1e-9) :]
    score = table.score("aum")[pool]
    low, high = score.min(), score.max()
    stratum = np.zeros(len(pool), int)
    if high > low:
        stratum = np.minimum(((score - low) / (high - low) * k).astype(int), k - 1)
    sizes = np.bincount(stratum, minlength=k if high > low else 1)
    quotas = allocate(sizes, m)
    hashes = keyed_hash(table.ids[pool], seed)
    kept: list[int] = []
    for index, quota in enumerate(quotas):
        members = np.flatnonzero(stratum == index)
        kept += pool[members[np.argsort(hashes[members])][:quota]].tolist()
    return np.sort(table.ids[kept])


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(2, 300),
    share=st.floats(0.01, 1),
    beta=st.floats(0, 0.6),
    k=st.integers(1, 60),
    seed=st.integers(0, 10),
)
def test_selection_equals_the_plain_reference(
    rows: int, share: float, beta: float, k: int, seed: int
) -> None:
    table = make_table(rows, seed)
    left = rows - int(beta * rows + 1e-9)
    m = max(1, int(share * left))
    found = select_ccs(table, m, SelectionConfig(beta=beta, strata=k, seed=seed))
    np.testing.assert_array_equal(found.ids, reference(table, m, beta, k, seed))
    assert int(found.quotas.sum()) == m == len(found.ids)
    assert (found.quotas <= found.sizes).all()


@pytest.mark.parametrize("edges", ["width", "quantile"])
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("ties", [False, True])
def test_any_partition_gives_the_same_coreset(edges: Any, balanced: bool, ties: bool) -> None:
    table = make_table(2000, 5, ties=ties)
    config = SelectionConfig(beta=0.13, seed=3, edges=edges, class_balanced=balanced)
    whole = select_ccs(table, 300, config)
    for parts in (1, 2, 7, 64):
        split = run_selection(mapper(cut_up(table, parts, parts)), 300, config)
        np.testing.assert_array_equal(split.ids, whole.ids)
        np.testing.assert_array_equal(split.sample.stratum, whole.sample.stratum)
        np.testing.assert_array_equal(split.quotas, whole.quotas)
        assert split.fingerprint == whole.fingerprint == table.fingerprint()
        assert split.cut == whole.cut


def test_the_cut_is_exact_when_the_boundary_does_not_fit_on_the_driver(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a tiny boundary the radix search goes down to single values, and into tied ids."""
    monkeypatch.setattr(selection_module, "BOUNDARY_ROWS", 1)
    for ties in (False, True):
        table = make_table(500, 2, ties=ties)
        for beta in (0.002, 0.31, 0.7):
            found = select_ccs(table, 100, SelectionConfig(beta=beta))
            np.testing.assert_array_equal(found.ids, reference(table, 100, beta, 50, 0))


def test_another_seed_gives_another_coreset_and_the_same_seed_the_same() -> None:
    table = make_table(1000)
    first = select_ccs(table, 100, SelectionConfig(seed=1)).ids
    np.testing.assert_array_equal(first, select_ccs(table, 100, SelectionConfig(seed=1)).ids)
    assert not np.array_equal(first, select_ccs(table, 100, SelectionConfig(seed=2)).ids)


def test_everything_is_kept_without_cutoff_and_with_the_whole_budget() -> None:
    table = make_table(50)
    np.testing.assert_array_equal(select_ccs(table, 50).ids, np.sort(table.ids))


def test_the_cut_removes_the_hardest_by_aum_whatever_is_stratified() -> None:
    table = make_table(400)
    found = select_ccs(table, 200, SelectionConfig(beta=0.25), score="el2n")
    hardest = table.ids[np.argsort(table.score("aum"))[:100]]
    assert not np.isin(found.ids, hardest).any()


def test_class_budgets_are_proportional_and_minimum_holds() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2, 3], [700, 200, 90, 10])
    table = ScoreTable(np.arange(1000), {"aum": rng.normal(size=1000)}, labels)
    found = select_ccs(table, 100, SelectionConfig(class_balanced=True))
    np.testing.assert_array_equal(found.classes_after, [70, 20, 9, 1])
    floor = select_ccs(table, 100, SelectionConfig(class_balanced=True, min_per_class=5))
    assert floor.classes_after.min() >= 5
    assert int(floor.classes_after.sum()) == 100


# The released code's defects, one test each.


@pytest.mark.parametrize("top", [-1.0, 0.0])
def test_largest_score_stays_when_the_maximum_is_not_positive(top: float) -> None:
    """Its upper edge is max * 1.0001, which lies below a negative maximum."""
    score = np.append(np.linspace(-9, -5, 30), top)
    table = ScoreTable(np.arange(31), {"aum": score})
    found = select_ccs(table, 31)
    assert 30 in found.ids
    assert found.sample.stratum[found.ids == 30] == 49


def test_every_class_is_selected_by_its_own_size() -> None:
    """Its class-balanced selection uses the last class's size for every class."""
    labels = np.repeat([0, 1], [300, 3])
    table = ScoreTable(np.arange(303), {"aum": np.arange(303.0)}, labels)
    found = select_ccs(table, 101, SelectionConfig(class_balanced=True))
    np.testing.assert_array_equal(found.classes_after, [100, 1])


def test_selection_changes_no_input() -> None:
    """Its cutoff overwrites the score array and leaves other columns at full length."""
    table = make_table(200)
    before = {name: values.copy() for name, values in table.scores.items()}
    found = select_ccs(table, 50, SelectionConfig(beta=0.3))
    for name, values in before.items():
        np.testing.assert_array_equal(table.scores[name], values)
    assert len(found.sample.score) == len(found.sample.hardness) == len(found.ids) == 50


def test_a_budget_beyond_the_pool_is_an_error_or_lowers_beta() -> None:
    """It silently returns fewer examples."""
    table = make_table(100)
    with pytest.raises(InfeasibleError, match=r"beta=0\.5 leaves 50 of 100"):
        select_ccs(table, 60, SelectionConfig(beta=0.5))
    relaxed = select_ccs(table, 60, SelectionConfig(beta=0.5, relax_beta=True))
    assert len(relaxed.ids) == 60
    assert relaxed.beta == pytest.approx(0.4)
    assert "beta lowered" in relaxed.warnings[0]


# Bad input and edge cases.


@pytest.mark.parametrize("m", [0, -1, 101, 2.5, True])
def test_bad_budgets(m: Any) -> None:
    with pytest.raises(ConfigError, match="m: expected"):
        select_ccs(make_table(100), m)


@pytest.mark.parametrize("beta", [-0.1, 1.0, float("nan")])
def test_bad_cutoff_rates(beta: float) -> None:
    with pytest.raises(ConfigError, match="beta"):
        SelectionConfig(beta=beta)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, 1.0])
def test_bad_pruning_rates(alpha: float) -> None:
    with pytest.raises(ConfigError, match="alpha"):
        coreset_size(100, alpha)


def test_default_beta_is_the_published_clip() -> None:
    assert [round(default_beta(a), 6) for a in (0.3, 0.5, 0.7, 0.9)] == [0, 0, 0.07, 0.14]
    assert coreset_size(20_000, 0.9) == 2000


def test_equal_scores_make_one_stratum() -> None:
    found = select_ccs(ScoreTable(np.arange(20), {"aum": np.ones(20)}), 5)
    assert len(found.sizes) == 1
    assert len(found.ids) == 5


def test_an_outlier_is_reported_and_quantile_strata_help() -> None:
    score = np.append(np.random.default_rng(0).normal(size=999), 1e12)
    table = ScoreTable(np.arange(1000), {"aum": score})
    stretched = select_ccs(table, 100)
    assert "edges=quantile" in stretched.warnings[0]
    even = select_ccs(table, 100, SelectionConfig(edges="quantile"))
    assert even.warnings == ()
    assert even.sizes.max() - even.sizes.min() <= 2
    assert set(even.quotas.tolist()) == {2}


def test_fewer_examples_than_strata_and_a_lost_class_are_reported() -> None:
    table = ScoreTable(np.arange(10), {"aum": np.arange(10.0)}, np.append(np.zeros(9, int), 1))
    found = select_ccs(table, 2, SelectionConfig(beta=0.0))
    assert any("fewer examples" in text for text in found.warnings)
    labels = np.append(1, np.zeros(9, int))  # the class of the hardest example is cut
    lost = ScoreTable(np.arange(10), {"aum": np.arange(10.0)}, labels)
    assert any("vanish" in t for t in select_ccs(lost, 5, SelectionConfig(beta=0.1)).warnings)


def test_extreme_scores_do_not_overflow() -> None:
    big = float(np.finfo(np.float64).max)
    table = ScoreTable(np.arange(4), {"aum": np.asarray([-big, -1.0, 1.0, big])})
    for edges in ("width", "quantile"):
        assert len(select_ccs(table, 4, SelectionConfig(edges=edges)).ids) == 4  # type: ignore[arg-type]


def test_bad_rows_are_named() -> None:
    good = np.arange(5.0)
    bad = np.asarray([0.0, np.nan, 1.0, np.inf, 2.0])
    with pytest.raises(ConfigError, match=r"ids \[1, 3\]"):
        ScoreTable(np.arange(5), {"aum": bad})
    with pytest.raises(ConfigError, match=r"ids \[1, 3\]"):
        run_selection(mapper([Block(np.arange(5), bad, good)]), 2, SelectionConfig())
    with pytest.raises(ConfigError, match=r"unique ids, got \[7\]"):
        run_selection(
            mapper([Block(np.asarray([7]), good[:1], good[:1])] * 2), 1, SelectionConfig()
        )
    with pytest.raises(ConfigError, match="not negative"):
        ScoreTable(np.asarray([-1, 2]), {"aum": np.zeros(2)})
    with pytest.raises(ConfigError, match="integer ids"):
        ScoreTable(np.asarray(["a", "b"]), {"aum": np.zeros(2)})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="5 rows, one per id"):
        ScoreTable(np.arange(5), {"aum": good[:4]})
    with pytest.raises(ConfigError, match="at least one example"):
        ScoreTable(np.zeros(0, np.int64), {})
    with pytest.raises(ConfigError, match="columns of one length"):
        Block(np.arange(5), good, good[:4])


def test_sparse_ids_are_checked_for_repeats() -> None:
    far = np.asarray([0, 10**15, 10**15], np.int64)
    with pytest.raises(ConfigError, match="unique"):
        run_selection(mapper([Block(far, np.zeros(3), np.zeros(3))]), 1, SelectionConfig())


def test_class_strata_need_labels_and_missing_scores_say_what_there_is() -> None:
    table = ScoreTable(np.arange(5), {"entropy": np.arange(5.0)})
    with pytest.raises(ConfigError, match="entropy"):
        select_ccs(table, 2)
    with pytest.raises(ConfigError, match="class labels"):
        select_ccs(
            table, 2, SelectionConfig(class_balanced=True), score="entropy", cutoff="entropy"
        )
    with pytest.raises(ConfigError, match="min_per_class"):
        SelectionConfig(min_per_class=2)


def test_weights_are_stratum_size_over_quota() -> None:
    found = select_ccs(make_table(500), 60)
    total = np.bincount(found.sample.stratum, found.weights(), minlength=50)
    np.testing.assert_allclose(total[found.quotas > 0], found.sizes[found.quotas > 0])
