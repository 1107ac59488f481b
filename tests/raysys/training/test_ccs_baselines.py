"""Baselines: small cases by hand, and what every method promises."""

from __future__ import annotations

import numpy as np
import pytest

from raysys.errors import ConfigError, InfeasibleError
from raysys.training.ccs import baselines as b
from raysys.training.ccs.baselines.graph import nearest_neighbours
from raysys.training.ccs.table import ScoreTable

METHODS: list[b.Method] = [
    b.CCS(0.1),
    b.CutRandom(0.1),
    b.D2Pruning(beta=0.1),
    b.EasiestFirst("el2n"),
    b.HardestFirst("forgetting"),
    b.Herding(),
    b.KCenter(),
    b.KCenter(by_class=True),
    b.Moderate(),
    b.Prototypes(clusters=3),
    b.Random(),
    b.StratifiedRandom(),
]


def make_table(rows: int = 120) -> ScoreTable:
    rng = np.random.default_rng(0)
    scores = {name: rng.normal(size=rows) for name in ("aum", "el2n", "forgetting")}
    features = rng.normal(size=(rows, 4)).astype(np.float32)
    return ScoreTable(rng.permutation(rows) + 7, scores, np.arange(rows) % 4, features)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_every_method_keeps_its_budget_and_its_seed(method: b.Method) -> None:
    table = make_table()
    ids = method.select(table, 30, seed=1)
    assert len(np.unique(ids)) == len(ids) == 30
    assert np.isin(ids, table.ids).all()
    assert (np.diff(ids) > 0).all()
    np.testing.assert_array_equal(ids, method.select(table, 30, seed=1))
    for bad in (0, 121, 1.5):
        with pytest.raises(ConfigError, match="m: expected"):
            method.select(table, bad, seed=0)  # type: ignore[arg-type]


def test_random_methods_do_not_depend_on_row_order() -> None:
    table = make_table()
    other = table.take(np.random.default_rng(3).permutation(len(table)))
    for method in (b.Random(), b.StratifiedRandom(), b.CutRandom(0.2), b.CCS(0.2)):
        np.testing.assert_array_equal(method.select(table, 40, 5), method.select(other, 40, 5))


def test_directions() -> None:
    table = ScoreTable(np.arange(4), {"aum": np.asarray([3.0, -2, 1, 0]), "loss": np.arange(4.0)})
    assert b.HardestFirst("aum").select(table, 2, 0).tolist() == [1, 3]
    assert b.EasiestFirst("aum").select(table, 2, 0).tolist() == [0, 2]
    assert b.HardestFirst("loss").select(table, 1, 0).tolist() == [3]
    assert 1 not in b.CutRandom(0.25).select(table, 3, 0)
    with pytest.raises(InfeasibleError, match="leaves 3"):
        b.CutRandom(0.25).select(table, 4, 0)


def test_stratified_random_keeps_class_shares() -> None:
    table = make_table()
    assert table.labels is not None
    kept = table.labels[table.rows_of(b.StratifiedRandom().select(table, 40, 0))]
    assert np.bincount(kept).tolist() == [10, 10, 10, 10]


def test_moderate_takes_the_band_around_the_median() -> None:
    """Distances from the centre are 0 1 1 2 2 and the median is 1: the two at 1 are kept."""
    features = np.asarray([[0], [1], [-1], [2], [-2]], np.float32)
    table = ScoreTable(np.arange(5), {}, np.zeros(5, int), features)
    assert b.Moderate().select(table, 2, 0).tolist() == [1, 2]


def test_k_center_finds_the_corners_and_survives_duplicates() -> None:
    features = np.asarray([[0, 0], [0, 0], [9, 0], [0, 9], [9, 9]], np.float32)
    table = ScoreTable(np.arange(5), {}, None, features)
    kept = b.KCenter().select(table, 4, 0)
    assert {2, 3, 4} <= set(kept.tolist())
    assert len(b.KCenter().select(table, 5, 0)) == 5


def test_herding_matches_the_mean() -> None:
    features = np.asarray([[-3], [-1], [1], [3], [0.1]], np.float32)
    table = ScoreTable(np.arange(5), {}, np.zeros(5, int), features)
    assert b.Herding().select(table, 1, 0).tolist() == [4]


def test_d2_spreads_difficulty_and_then_diversity() -> None:
    """Two tight pairs: the second of a pair loses its score once the first is taken."""
    features = np.asarray([[0], [0.01], [10], [10.01]], np.float32)
    scores = {"aum": np.zeros(4), "forgetting": np.asarray([4.0, 3.9, 1.0, 0.9])}
    table = ScoreTable(np.arange(4), scores, None, features)
    method = b.D2Pruning(neighbours=1, gamma=1.0, bandwidth=1.0)
    assert method.select(table, 2, 0).tolist() == [0, 2]
    with pytest.raises(ConfigError, match="gamma"):
        b.D2Pruning(gamma=2.0)


def test_blocked_neighbours_equal_brute_force() -> None:
    x = np.random.default_rng(0).normal(5, 1, (70, 6)).astype(np.float32)
    near, distance = nearest_neighbours(x, 3, block_rows=16)
    full = np.linalg.norm(x[:, None].astype(float) - x[None].astype(float), axis=2)
    np.fill_diagonal(full, np.inf)
    np.testing.assert_array_equal(near, np.argsort(full, axis=1)[:, :3])
    np.testing.assert_allclose(distance, np.sort(full, axis=1)[:, :3], rtol=1e-5)


def test_methods_say_what_they_need() -> None:
    table = ScoreTable(np.arange(5), {"aum": np.arange(5.0)})
    with pytest.raises(ConfigError, match="class labels, needed by StratifiedRandom"):
        b.StratifiedRandom().select(table, 2, 0)
    with pytest.raises(ConfigError, match="feature array, needed by KCenter"):
        b.KCenter().select(table, 2, 0)


def test_info_batch_keeps_the_expected_gradient() -> None:
    """Over many epochs each example's mean weight (0 where dropped) is one."""
    pruner = b.InfoBatch(200, epochs=4000, ratio=0.5, delta=1.0)
    rows, weights = pruner.epoch(0)
    assert len(rows) == 200
    assert set(weights.tolist()) == {1.0}  # nothing is known yet
    pruner.update(np.arange(200), np.arange(200.0))
    total = np.zeros(200)
    for epoch in range(2000):
        rows, weights = pruner.epoch(epoch)
        total[rows] += weights
    np.testing.assert_allclose(total / 2000, 1.0, atol=0.12)
    assert (total[100:] == 2000).all()  # losses above the mean are never dropped


def test_info_batch_ends_with_everything_and_resumes() -> None:
    pruner = b.InfoBatch(100, epochs=8, seed=1)
    pruner.update(np.arange(100), np.arange(100.0))
    assert len(pruner.epoch(6)[0]) < 100
    assert len(pruner.epoch(7)[0]) == 100
    again = b.InfoBatch(100, epochs=8, seed=1)
    again.load_state_dict(pruner.state_dict())
    np.testing.assert_array_equal(again.epoch(3)[0], pruner.epoch(3)[0])
    for bad in ({"rows": 0}, {"ratio": 1.0}, {"delta": 2.0}):
        with pytest.raises(ConfigError):
            b.InfoBatch(**{"rows": 5, "epochs": 2, **bad})  # type: ignore[arg-type]
