"""Water-filling, class budgets, hashes and mergeable samples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysys.errors import ConfigError, InfeasibleError
from raysys.training.ccs.blocks import Sample
from raysys.training.ccs.hashing import descending_key, keyed_hash, mix64, multiset_digest
from raysys.training.ccs.strata import allocate, class_budgets, equal_width, from_quantiles

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=20)


def test_water_filling_by_hand() -> None:
    np.testing.assert_array_equal(allocate(np.asarray([2, 10, 10, 0]), 14), [2, 6, 6, 0])
    np.testing.assert_array_equal(allocate(np.asarray([5, 5, 5]), 7), [2, 2, 3])


@given(SIZES, st.floats(0, 1))
def test_water_filling_properties(sizes: list[int], share: float) -> None:
    array = np.asarray(sizes, np.int64)
    budget = int(share * array.sum())
    quotas = allocate(array, budget)
    assert int(quotas.sum()) == budget
    assert (quotas <= array).all()
    free = quotas[quotas < array]
    if len(free):
        assert free.max() - free.min() <= 1
        # A full stratum lies below the water; the remainder may have lifted it by one.
        assert (array[quotas == array] <= free.min() + 1).all()


def test_water_filling_refuses_what_cannot_be_met() -> None:
    with pytest.raises(InfeasibleError, match="the strata hold 3"):
        allocate(np.asarray([1, 2]), 4)
    with pytest.raises(ConfigError, match="budget"):
        allocate(np.asarray([1, 2]), -1)


@given(SIZES, st.data())
def test_class_budget_properties(frequency: list[int], data: st.DataObject) -> None:
    counts = np.asarray(frequency, np.int64)
    room = np.asarray([data.draw(st.integers(0, c)) for c in frequency], np.int64)
    budget = data.draw(st.integers(0, int(room.sum())))
    budgets = class_budgets(counts, room, budget)
    assert int(budgets.sum()) == budget
    assert (budgets <= room).all()
    if (room == counts).all() and counts.sum():
        assert np.abs(budgets - budget * counts / counts.sum()).max() <= 1


def test_class_budgets_refuse_impossible_minima() -> None:
    with pytest.raises(InfeasibleError, match="per class"):
        class_budgets(np.asarray([10, 10]), np.asarray([10, 10]), 5, min_per_class=3)
    with pytest.raises(InfeasibleError, match="are left"):
        class_budgets(np.asarray([10]), np.asarray([2]), 5)


def test_equal_width_edges_and_top() -> None:
    strata = equal_width(-4.0, 0.0, 4)
    np.testing.assert_array_equal(
        strata.index(np.asarray([-4, -3.5, -3, -0.1, 0])), [0, 0, 1, 3, 3]
    )
    assert equal_width(1.0, 1.0, 50).count == 1
    assert from_quantiles(np.asarray([1.0, 1.0, 2.0])).count == 3


def test_splitmix_known_value_and_bijection() -> None:
    # First output of SplitMix64 seeded with 0, from its reference implementation.
    assert int(mix64(np.zeros(1, np.uint64))[0]) == 0xE220A8397B1DCDAF
    ids = np.arange(10_000)
    assert len(np.unique(keyed_hash(ids, 5))) == 10_000
    assert not np.array_equal(keyed_hash(ids, 5), keyed_hash(ids, 6))


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=2, max_size=30))
def test_descending_keys_keep_the_order(values: list[float]) -> None:
    array = np.asarray(values)
    keys = descending_key(array)
    np.testing.assert_array_equal(array[np.argsort(keys, kind="stable")], np.sort(array)[::-1])
    assert descending_key(np.asarray([-0.0]))[0] == descending_key(np.asarray([0.0]))[0]


def test_digest_ignores_order_and_sees_labels() -> None:
    ids, labels = np.arange(100), np.arange(100) % 7
    order = np.random.default_rng(0).permutation(100)
    whole = multiset_digest(ids, labels)
    assert whole == multiset_digest(ids[order], labels[order])
    parts = multiset_digest(ids[:40], labels[:40]) + multiset_digest(ids[40:], labels[40:])
    assert whole == parts % 2**64
    changed = labels.copy()
    changed[3] = 6
    assert whole != multiset_digest(ids, changed)
    assert whole != multiset_digest(ids, None)


@given(st.integers(1, 6), st.integers(0, 5))
def test_bottom_q_lists_merge(parts: int, seed: int) -> None:
    """The bottom of merged bottoms is the bottom of everything: incremental coresets are exact."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(200)
    stratum = rng.integers(0, 4, 200)
    whole = Sample(ids, ids * 1.0, ids * 1.0, stratum, keyed_hash(ids, 1))
    quotas = np.asarray([3, 0, 10, 500])
    pieces = [whole.take(rows).bottom(quotas) for rows in np.array_split(np.arange(200), parts)]
    merged = Sample.merge(pieces).bottom(quotas)
    np.testing.assert_array_equal(merged.ids, whole.bottom(quotas).ids)
