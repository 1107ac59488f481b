"""Incremental coresets equal a selection from scratch; scoring stops when the order settles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.errors import ConfigError, InfeasibleError
from raysys.training.ccs.blocks import Block
from raysys.training.ccs.convergence import ScoringStopper, rank_correlation
from raysys.training.ccs.incremental import CoresetSummary, SummaryPlan
from raysys.training.ccs.selection import SelectionConfig, select_ccs
from raysys.training.ccs.table import ScoreTable


def make_table(rows: int, seed: int) -> ScoreTable:
    rng = np.random.default_rng(seed)
    return ScoreTable(np.arange(rows), {"aum": rng.normal(size=rows) ** 3})


def block(table: ScoreTable, rows: np.ndarray) -> Block:
    part = table.take(rows)
    return Block(part.ids, part.score("aum"), part.hardness("aum"))


@settings(max_examples=40, deadline=None)
@given(parts=st.integers(1, 6), share=st.floats(0.02, 0.9), seed=st.integers(0, 50))
def test_merged_summaries_give_the_coreset_of_all_rows(parts: int, share: float, seed: int) -> None:
    table = make_table(300, seed)
    config = SelectionConfig(beta=0.1, strata=12, seed=seed)
    whole = select_ccs(table, max(1, int(share * 270)), config)
    plan = SummaryPlan.of(whole, config.seed)
    order = np.random.default_rng(seed).permutation(300)
    pieces = [CoresetSummary.of(block(table, r), plan) for r in np.array_split(order, parts)]
    merged = pieces[0]
    for piece in pieces[1:]:
        merged = merged.merge(piece)
    np.testing.assert_array_equal(merged.coreset_ids(), whole.ids)
    assert len(merged.sample) <= plan.m + 12


def test_new_data_joins_without_the_old_rows() -> None:
    table = make_table(400, 1)
    first = select_ccs(table.take(np.arange(200)), 40, SelectionConfig(beta=0.1))
    plan = SummaryPlan.of(first, 0)
    old = CoresetSummary.of(block(table, np.arange(200)), plan)
    np.testing.assert_array_equal(old.coreset_ids(), first.ids)
    grown = old.merge(CoresetSummary.of(block(table, np.arange(200, 400)), plan))
    again = CoresetSummary.of(block(table, np.arange(400)), plan)
    np.testing.assert_array_equal(grown.coreset_ids(), again.coreset_ids())
    assert (grown.coreset_ids() >= 200).any()


def test_summaries_that_do_not_belong_together_are_refused() -> None:
    table = make_table(100, 2)
    one = select_ccs(table, 20)
    plan = SummaryPlan.of(one, 0)
    summary = CoresetSummary.of(block(table, np.arange(100)), plan)
    with pytest.raises(ConfigError, match="one plan"):
        summary.merge(CoresetSummary.of(block(table, np.arange(50)), SummaryPlan.of(one, 1)))
    with pytest.raises(ConfigError, match="one part only"):
        summary.merge(summary)
    few = CoresetSummary.of(block(table, np.arange(5)), plan)
    with pytest.raises(InfeasibleError, match="hold 5"):
        few.coreset_ids()
    labelled = ScoreTable(table.ids, table.scores, table.ids % 2)
    balanced = select_ccs(labelled, 20, SelectionConfig(class_balanced=True))
    with pytest.raises(ConfigError, match="one group"):
        SummaryPlan.of(balanced, 0)


def test_rank_correlation_by_hand() -> None:
    x = np.asarray([1.0, 2, 3, 4])
    assert rank_correlation(x, x**3) == pytest.approx(1)
    assert rank_correlation(x, -x) == pytest.approx(-1)
    assert rank_correlation(x, np.asarray([1.0, 3, 2, 4])) == pytest.approx(0.8)
    assert rank_correlation(np.ones(3), x[:3]) == 1.0
    with pytest.raises(ConfigError, match="2 or more"):
        rank_correlation(x, x[:1])


def test_scoring_stops_when_the_order_settles() -> None:
    rng = np.random.default_rng(0)
    settled = rng.normal(size=500)
    stopper = ScoringStopper(threshold=0.98, patience=2)
    assert not stopper.update(rng.normal(size=500))
    assert not stopper.update(settled)
    assert not stopper.update(settled + 0.01 * rng.normal(size=500))
    assert stopper.update(settled)
    assert stopper.correlations[0] < 0.2
    assert stopper.correlations[-1] > 0.98
    for bad in ({"threshold": 0.0}, {"patience": 0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            ScoringStopper(**bad)  # type: ignore[arg-type]
