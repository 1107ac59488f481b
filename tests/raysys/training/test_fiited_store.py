"""The store under random operations, bad input and hostile streams."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.errors import ConfigError, InfeasibleError
from raysys.training.fiited.config import FiitedConfig, TableSpec
from raysys.training.fiited.metrics import statistics
from raysys.training.fiited.store import FiitedStore, round_gap

WIDE = 2**63 - 1


def build(rows: int = 1000, dim: int = 16, tables: int = 1, **fields: Any) -> FiitedStore:
    given_fields = {"chunk": 4, "budget_slots": 200, "poison": True, "page_bytes": 4096} | fields
    specs = tuple(TableSpec(name=f"t{i}", dim=dim, rows=rows) for i in range(tables))
    return FiitedStore(FiitedConfig(**given_fields), specs, engine="native")


def step(store: FiitedStore, ids: Any, grad: float = 1.0) -> np.ndarray:
    values = [np.asarray(ids)] * len(store.tables)
    out, batch = store.lookup(values, train=True)
    store.update(batch, np.full(out.shape, grad, np.float32))
    store.end_step()
    return out


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    shape=st.sampled_from(["prefix", "free"]),
    policy=st.sampled_from(["fullest", "lifo"]),
    optimizer=st.sampled_from(["sgd", "adam"]),
    slots=st.integers(4, 400),
    interval=st.integers(1, 9),
)
def test_invariants_hold_after_random_operations(
    seed: int, shape: Any, policy: Any, optimizer: str, slots: int, interval: int
) -> None:
    """Budget, index and pool stay consistent, and freed memory (NaN) never reaches a lookup."""
    store = build(
        shape=shape,
        free_policy=policy,
        optimizer=optimizer,
        budget_slots=slots,
        interval=interval,
    )
    rng = np.random.default_rng(seed)
    for _ in range(25):
        action = rng.integers(6)
        if action == 0:
            store.adjust()
        elif action == 1:
            store.set_budget(int(rng.integers(4, 400)))
        else:
            ids = rng.zipf(1.2, 50) % (10 ** int(rng.integers(1, 5)))
            assert np.isfinite(step(store, ids, float(rng.normal()))).all()
        assert store.engine.counters()["alive"] <= store.slots
        store.verify()


def test_growth_keeps_the_function_and_eviction_touches_only_its_rows() -> None:
    store = build(cadence="manual", budget_slots=40, slack=0.0)
    for _ in range(3):
        step(store, np.arange(8))
        store.adjust()
    before = {i: store.export_dense("t0", [i])[0] for i in range(8)}
    lengths = store.dims("t0", np.arange(8))
    step_ids = np.repeat(np.arange(8), 3)
    _, batch = store.lookup([step_ids], train=True)
    store.update(batch, np.zeros((24, 16), np.float32))
    store.adjust()
    for i, old in before.items():
        assert np.array_equal(store.export_dense("t0", [i])[0][: lengths[i]], old[: lengths[i]])
    store.set_budget(20)
    after = store.dims("t0", np.arange(8))
    assert after.sum() < lengths.sum()
    for i, old in before.items():
        assert np.array_equal(store.export_dense("t0", [i])[0][: after[i]], old[: after[i]])


def test_lookup_is_the_same_after_compaction_and_directory_growth() -> None:
    store = build(budget_slots=6000, admit_after=0, cadence="manual", slack=0.0)
    _, batch = store.lookup([np.arange(1400)], train=True)
    rng = np.random.default_rng(1)
    store.update(batch, rng.normal(size=(1400, 16)).astype(np.float32))
    before = store.export_dense("t0", np.arange(50))
    store.lookup([np.arange(1400, 1500)], train=True)  # splits directory segments
    assert np.array_equal(store.export_dense("t0", np.arange(50)), before)
    kept = store.dims("t0", np.arange(50))
    store.set_budget(2000)
    store.engine.compact(1 << 40)
    store.verify()
    now = store.dims("t0", np.arange(50))
    assert now.sum() < kept.sum()
    for i in range(50):
        vector = store.export_dense("t0", [i])[0]
        assert np.array_equal(vector[: now[i]], before[i][: now[i]])


def test_a_flood_of_one_off_ids_does_not_displace_established_rows() -> None:
    store = build(budget_slots=100, interval=5, page_bytes=65536)
    for _ in range(60):
        step(store, np.repeat(np.arange(20), 4))
    before = store.dims("t0", np.arange(20)).sum()
    assert before == 20 * 16
    rng = np.random.default_rng(0)
    for _ in range(60):
        step(store, np.concatenate([np.arange(20), rng.integers(0, WIDE, 300)]))
    assert store.dims("t0", np.arange(20)).sum() >= 0.9 * before
    store.verify()


def test_ids_at_the_limits_and_negative_ids() -> None:
    limits = np.array([0, 1, 2**32, WIDE - 1, WIDE], np.int64)
    store = build(admit_after=0, cadence="manual")
    step(store, limits)
    assert (store.dims("t0", limits) == 16).all()
    assert len({v.tobytes() for v in store.export_dense("t0", limits)}) == 5
    keys = store.engine.virtual_rows(0, limits)
    assert np.array_equal(store.engine.raw_ids(0, keys), limits)
    with pytest.raises(ConfigError, match="-5 at position 1"):
        step(store, [1, -5])
    bits = build(admit_after=0, cadence="manual", id_space="bits")
    step(bits, [-1])
    assert np.array_equal(
        bits.export_dense("t0", [-1]), bits.export_dense("t0", np.array([2**64 - 1], np.uint64))
    )


def test_nan_gradient_rejects_its_rows_only() -> None:
    store = build(admit_after=0, cadence="manual")
    _, batch = store.lookup([np.array([1, 2])], train=True)
    before = store.export_dense("t0", [1, 2])
    grad = np.ones((2, 16), np.float32)
    grad[0, 3] = np.nan
    assert store.update(batch, grad) == 1
    after = store.export_dense("t0", [1, 2])
    assert np.array_equal(after[0], before[0])
    assert not np.array_equal(after[1], before[1])
    assert store.engine.counters()["nonfinite"] == 1
    assert store.utility("t0", [1]).max() == 0
    strict = build(admit_after=0, cadence="manual", on_nonfinite="raise")
    _, batch = strict.lookup([np.array([1, 2])], train=True)
    with pytest.raises(ConfigError, match="finite"):
        strict.update(batch, grad)


def test_backward_after_the_row_was_evicted_only_feeds_utilities() -> None:
    store = build(budget_slots=8, cadence="manual", slack=0.0, min_alive=0)
    step(store, [1, 2])
    store.adjust()
    _, batch = store.lookup([np.array([1, 2])], train=True)
    store.set_budget(1)
    resident = store.dims("t0", [1, 2])
    gone = int(np.argmin(resident)) + 1
    assert resident.min() == 0
    store.update(batch, np.ones((2, 16), np.float32))
    assert np.count_nonzero(store.export_dense("t0", [gone])) == 0
    store.verify()


def test_pins_survive_and_a_budget_below_them_is_infeasible() -> None:
    store = build(budget_slots=30, interval=3)
    store.pin("t0", [901, 902])
    for _ in range(30):
        step(store, np.repeat(np.arange(60), 2))
    assert (store.dims("t0", [901, 902]) > 0).all()
    with pytest.raises(InfeasibleError, match="pinned"):
        store.set_budget(1)
    with pytest.raises(InfeasibleError):
        store.pin("t0", np.arange(100, 200))
    store.verify()


def test_frozen_store_answers_and_refuses_change() -> None:
    store = build(admit_after=0)
    step(store, [1])
    store.freeze()
    assert store.dims("t0", [1])[0] == 16
    with pytest.raises(ConfigError, match="frozen"):
        store.lookup([np.array([1])], train=True)
    _, batch = store.lookup([np.array([1])])
    with pytest.raises(ConfigError, match="evaluation"):
        store.update(batch, np.zeros((1, 16), np.float32))


def test_use_in_a_forked_child_is_refused() -> None:
    store = build()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            store.engine.counters()
        except ConfigError:
            code = 7
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_field_of_equal_ids_and_a_long_bag() -> None:
    store = build(admit_after=0, cadence="manual")
    offsets = [np.array([0, 1_000_000])]
    out, batch = store.lookup([np.zeros(1_000_000, np.int64)], offsets, mean=True, train=True)
    np.testing.assert_allclose(out, store.export_dense("t0", [0]), rtol=0.03)  # fp32 sum
    assert batch.rows == 1


def test_adversarial_ids_spread_like_random_ones() -> None:
    """Arithmetic progressions and multiples of 2^32 fill buckets evenly after the mixer."""
    store = build()
    for ids in (np.arange(40960), np.arange(40960) << 32, np.arange(40960) * 4096):
        keys = store.engine.virtual_rows(0, ids.astype(np.int64))
        load = np.bincount((keys >> np.uint64(52)).astype(np.int64), minlength=4096)
        assert load.max() <= 30  # mean 10; a random assignment reaches about 25


def test_budget_in_bytes_bounds_pool_and_index_together() -> None:
    limit = 4 * 2**20
    store = build(budget_slots=None, budget_bytes=limit, page_bytes=65536, sketch_cells=16384)
    rng = np.random.default_rng(2)
    for _ in range(40):
        step(store, rng.integers(0, 10**6, 4000))
    assert store.engine.counters()["mapped_peak"] <= limit
    assert statistics(store)["rows"] > 1000
    store.verify()


def test_ten_thousand_equal_increments_lose_nothing() -> None:
    store = build(cadence="manual", admit_after=0, optimizer="sgd", lr=0.0, utility="grad")
    for _ in range(10_000):
        _, batch = store.lookup([np.array([1])], train=True)
        store.update(batch, np.full((1, 16), 0.01, np.float32))
    assert store.utility("t0", [1])[0] == pytest.approx(10_000 * 0.02, rel=0.02)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"budget_slots": 0}, "budget_slots"),
        ({"budget_slots": -3}, "budget_slots"),
        ({"budget_slots": None}, "budget_slots"),
        ({"budget_ratio": 0.5}, "budget_slots"),
        ({"budget_slots": None, "budget_ratio": 1.0}, "budget_ratio"),
        ({"budget_slots": None, "budget_bytes": 2**49}, "budget_bytes"),
        ({"chunk": 6}, "chunk"),
        ({"chunk": 12}, "t0.dim"),
        ({"gamma": 0.0}, "gamma"),
        ({"gamma": 1.5}, "gamma"),
        ({"dim": 128}, "t0.dim"),
        ({"tables": 2, "budget_slots": 1}, "budget"),
        ({"page_bytes": 5000}, "page_bytes"),
    ],
)
def test_wrong_configuration_names_the_field(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(**fields)
    assert caught.value.field == name


def test_round_schedule_starts_dense() -> None:
    assert [round_gap(s, 1000) for s in (0, 9, 10, 99, 100, 999, 1000)] == [
        3, 3, 30, 30, 300, 300, 1000,
    ]  # fmt: skip
    assert round_gap(500, 20) == 20
