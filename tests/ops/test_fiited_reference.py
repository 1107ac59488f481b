"""The compiled store against its reference twin: the same bits after the same steps."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysys.ops.fiited_arithmetic import mix, unmix
from raysys.ops.native import runnable_isas
from raysys.training.fiited.config import FiitedConfig, TableSpec
from raysys.training.fiited.store import FiitedStore

TABLES = (TableSpec(name="a", dim=16, rows=300), TableSpec(name="b", dim=8, rows=60, weight=2.0))


def build(
    engine: str, isa: str | None = None, tables: tuple[TableSpec, ...] = TABLES, **fields: Any
) -> FiitedStore:
    given = {"chunk": 4, "budget_slots": 120, "seed": 3, "page_bytes": 4096} | fields
    return FiitedStore(FiitedConfig(**given), tables, engine=engine, isa=isa)


def train(store: FiitedStore, steps: int, bags: bool = False) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    outputs = []
    for _ in range(steps):
        ids = [np.minimum(rng.zipf(1.3, 40), t.rows) for t in TABLES]
        offsets, weights = None, None
        if bags:
            cuts = [np.sort(rng.integers(0, 41, 6)) for _ in TABLES]
            offsets = [np.concatenate([[0], cut, [40]]) for cut in cuts]
            weights = [rng.normal(size=40).astype(np.float32) for _ in TABLES]
        out, batch = store.lookup(ids, offsets, mean=bags, weights=weights, train=True)
        grad = rng.normal(size=out.shape).astype(np.float32)
        store.update(batch, grad, loss_scale=4.0)
        store.end_step()
        store.verify()
        outputs.append(out.copy())
    return outputs


def assert_equal(one: FiitedStore, other: FiitedStore) -> None:
    mine, theirs = one.engine.counters(), other.engine.counters()
    for name in ("rows", "alive", "grown", "evicted", "admitted", "removed", "round", "scale"):
        assert mine[name] == theirs[name], name
    by_use = one.engine.lengths_by_use()
    assert np.array_equal(by_use, other.engine.lengths_by_use())
    assert by_use.sum() == mine["rows"]
    for table in TABLES:
        ids = np.arange(table.rows + 1)
        assert np.array_equal(one.dims(table.name, ids), other.dims(table.name, ids))
        vectors = one.export_dense(table.name, ids), other.export_dense(table.name, ids)
        assert np.array_equal(*vectors)
        assert np.array_equal(one.utility(table.name, ids), other.utility(table.name, ids))


def trained_alike(**fields: Any) -> FiitedStore:
    """Train both engines, check that they give the same bits; the compiled one."""
    stores = [build(engine, interval=5, **fields) for engine in ("native", "reference")]
    outputs = [train(store, 24) for store in stores]
    assert all(np.array_equal(a, b) for a, b in zip(*outputs))
    assert stores[0].engine.counters()["evicted"] > 0
    assert_equal(*stores)
    return stores[0]


@pytest.mark.parametrize(
    ("shape", "optimizer", "utility"),
    [
        ("prefix", "rowwise_adagrad", "freq_grad"),
        ("prefix", "adam", "saliency"),
        ("free", "adagrad", "saliency"),
        ("free", "sgd", "grad"),
        ("prefix", "sgd", "freq"),
    ],
)
@pytest.mark.parametrize("cadence", ["continuous", "interval"])
def test_compiled_store_equals_reference(
    shape: str, optimizer: str, utility: str, cadence: str
) -> None:
    store = trained_alike(shape=shape, optimizer=optimizer, utility=utility, cadence=cadence)
    assert store.engine.counters()["grown"] > 0


@pytest.mark.parametrize("shape", ["prefix", "free"])
def test_rounds_over_four_chunks_of_equal_weight_equal_reference(shape: str) -> None:
    """Four chunks and equal weights take the vector path of a round, on every instruction set."""
    tables = tuple(replace(table, weight=1.0) for table in TABLES)
    fields = {"shape": shape, "cadence": "interval", "interval": 3, "tables": tables}
    reference = build("reference", **fields)
    train(reference, 30)
    assert reference.engine.counters()["evicted"] > 0
    for isa in runnable_isas():
        compiled = build("native", isa=isa, **fields)
        train(compiled, 30)
        assert_equal(compiled, reference)


@pytest.mark.parametrize("chunk", [4, 8, 16])
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "sgd"])
def test_rows_of_four_chunks_equal_reference(chunk: int, optimizer: str) -> None:
    """All tables of four chunks take the short path of a step, on every instruction set."""
    tables = tuple(replace(table, dim=4 * chunk) for table in TABLES)
    fields = {"chunk": chunk, "optimizer": optimizer, "interval": 5, "tables": tables}
    reference = build("reference", **fields)
    expected = train(reference, 20)
    lengths = reference.dims("a", np.arange(301)) // chunk
    assert {0, 1, 4} <= set(lengths)
    for isa in runnable_isas():
        compiled = build("native", isa=isa, **fields)
        assert all(np.array_equal(a, b) for a, b in zip(expected, train(compiled, 20)))
        assert_equal(compiled, reference)


@pytest.mark.parametrize("chunk", [4, 8, 16])
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_large_outputs_that_pass_the_cache_are_the_same(chunk: int, weights: str) -> None:
    tables = tuple(replace(table, dim=4 * chunk) for table in TABLES)
    for isa in runnable_isas():
        store = build("native", isa=isa, chunk=chunk, weights=weights, interval=5, tables=tables)
        train(store, 20)
        bags = (5 << 20) // (4 * store.width)
        rng = np.random.default_rng(0)
        ids = [rng.integers(0, 400, bags) for _ in tables]
        large, _ = store.lookup(ids)
        assert large.nbytes >= 4 << 20
        raw = np.full(large.size + 1, 7.0, np.float32)
        shifted, _ = store.lookup(ids, out=raw[1:].reshape(large.shape))
        assert np.array_equal(large, shifted)
        for low in range(0, bags, 999):
            some, _ = store.lookup([table[low : low + 999] for table in ids])
            assert np.array_equal(large[low : low + 999], some)
        assert np.count_nonzero(large)


def test_bags_means_and_weights_equal_reference() -> None:
    stores = [build(engine, admit_after=0) for engine in ("native", "reference")]
    outputs = [train(store, 12, bags=True) for store in stores]
    assert all(np.array_equal(a, b) for a, b in zip(*outputs))
    assert np.abs(outputs[0][-1]).max() > 0


def test_every_instruction_set_gives_the_same_bits() -> None:
    stores = [build("native", isa=isa) for isa in runnable_isas()]
    outputs = [train(store, 20) for store in stores]
    for one, other in itertools.pairwise(outputs):
        assert all(np.array_equal(a, b) for a, b in zip(one, other))
    assert "portable" in runnable_isas()


def test_table_scope_weight_decay_clip_and_lifo_equal_reference() -> None:
    fields = {"scope": "table", "weight_decay": 0.01, "clip": 1.5, "free_policy": "lifo"}
    stores = [
        build(engine, cadence="interval", interval=5, **fields)
        for engine in ("native", "reference")
    ]
    for store in stores:
        train(store, 30)
    assert_equal(*stores)


@pytest.mark.parametrize("scope", ["global", "table"])
def test_rounds_that_split_segments_equal_reference(scope: str) -> None:
    """Rows of both tables grow while rows from the queue split the segments that they lie in."""
    tables = tuple(replace(table, dim=16, rows=1200, weight=1.0) for table in TABLES)
    fields = {"scope": scope, "cadence": "manual", "tables": tables, "budget_slots": 2600}
    stores = [build(engine, admit_after=1, **fields) for engine in ("native", "reference")]
    segments = []
    for turn in range(3):
        rng = np.random.default_rng(turn)
        ids = [rng.integers(0, 400 * (turn + 1), 500) for _ in tables]
        for _ in range(2):
            grad = rng.normal(size=(500, 32)).astype(np.float32)
            for store in stores:
                store.update(store.lookup(ids, train=True)[1], grad)
                store.end_step()
        for store in stores:
            store.adjust()
            store.verify()
        segments.append(stores[0].engine.counters()["segments"])
    assert segments[-1] > segments[0] > 1
    assert stores[0].engine.counters()["evicted"] > 0
    for table in tables:
        known = np.arange(table.rows)
        assert np.array_equal(*(store.dims(table.name, known) for store in stores))
        assert np.array_equal(*(store.utility(table.name, known) for store in stores))
        assert np.array_equal(*(store.export_dense(table.name, known) for store in stores))


def test_lazy_decay_renormalises_without_changing_anything() -> None:
    """With gamma 0.5 the scale passes 2^60 after 61 rounds; both engines must cross it alike."""
    fields = {"gamma": 0.5, "cadence": "interval", "interval": 1}
    stores = [build(engine, **fields) for engine in ("native", "reference")]
    for store in stores:
        train(store, 70)
        assert store.engine.counters()["scale"] < 2.0**60
    assert_equal(*stores)


@given(st.integers(0, 2**64 - 1))
def test_mixer_is_a_bijection(x: int) -> None:
    assert unmix(mix(x)) == x
