"""bfloat16 weights: unbiased rounding, the reference's bits, loads from and into fp32 stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysys.errors import ConfigError
from raysys.ops.fiited_arithmetic import noise_seed, round_nearest, round_noisy
from raysys.ops.native import runnable_isas
from raysys.training.fiited import checkpoint
from raysys.training.fiited.config import FiitedConfig, TableSpec
from raysys.training.fiited.store import FiitedStore
from tests.ops.test_fiited_reference import TABLES, assert_equal, build, train, trained_alike

FLOATS = st.floats(-(2.0**90), 2.0**90, width=32, allow_subnormal=False)


def vectors(store: FiitedStore) -> list[np.ndarray]:
    return [store.export_dense(t.name, np.arange(t.rows + 1)) for t in TABLES]


def is_bfloat(values: np.ndarray) -> bool:
    return not (np.ascontiguousarray(values).view(np.uint32) & 0xFFFF).any()


@given(FLOATS, st.integers(0, 2**32 - 1))
def test_rounding_goes_to_a_neighbour_and_keeps_what_fits(x: float, seed: int) -> None:
    value = np.full(8, x, np.float32)
    rounded = round_noisy(value, seed, 4)
    assert is_bfloat(rounded)
    low = (value.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    high = (low.view(np.uint32) + np.uint32(0x10000)).view(np.float32)
    assert np.all((rounded == low) | (rounded == high))
    assert np.array_equal(round_noisy(low, seed, 0), low)
    nearest = round_nearest(value)
    assert np.all(np.abs(nearest - value) <= np.abs(low - value))


def test_rounding_is_unbiased() -> None:
    value = np.linspace(-1.3, 1.7, 64).astype(np.float32)
    seeds = [noise_seed(12345, 7, step) for step in range(4000)]
    mean = np.mean([round_noisy(value, seed, 0).astype(np.float64) for seed in seeds], axis=0)
    spacing = np.exp2(np.floor(np.log2(np.abs(value))) - 7)
    # The mean of 4,000 draws between two neighbours has a standard error below spacing / 126.
    assert np.max(np.abs(mean - value) / spacing) < 5 / 126


@pytest.mark.parametrize(
    ("shape", "optimizer", "utility"),
    [
        ("prefix", "rowwise_adagrad", "freq_grad"),
        ("prefix", "adam", "saliency"),
        ("free", "adagrad", "saliency"),
        ("free", "sgd", "grad"),
    ],
)
def test_compiled_store_equals_reference(shape: str, optimizer: str, utility: str) -> None:
    store = trained_alike(shape=shape, optimizer=optimizer, utility=utility, weights="bf16")
    assert all(is_bfloat(v) for v in vectors(store))


@pytest.mark.parametrize("chunk", [4, 8])
def test_wide_rows_bags_and_every_instruction_set_give_the_same_bits(chunk: int) -> None:
    """Rows of 40 floats take the vector of 16 and its remainder; lanes are 4 and 8."""
    tables = tuple(TableSpec(name=t.name, dim=40, rows=t.rows) for t in TABLES)
    fields = {"chunk": chunk, "weights": "bf16", "admit_after": 0, "tables": tables}
    stores = [build("reference", **fields)]
    stores += [build("native", isa=isa, **fields) for isa in runnable_isas()]
    outputs = [train(store, 10, bags=True) for store in stores]
    for other in outputs[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(outputs[0], other))
    for store in stores[1:]:
        assert_equal(stores[0], store)


def test_small_steps_add_up() -> None:
    """10,000 steps of a 64th of a spacing: as in fp32, where rounding to nearest stays put."""
    ids, moved = np.arange(64), {}
    for weights in ("fp32", "bf16"):
        config = FiitedConfig(
            chunk=4, budget_ratio=0.0, slack=0.0, admit_after=0, optimizer="sgd", weights=weights,
            cadence="manual", init="constant", init_scale=1.0,
        )  # fmt: skip
        store = FiitedStore(config, (TableSpec(name="t", dim=16, rows=64),))
        for _ in range(10_000):
            out, batch = store.lookup([ids], train=True)
            store.update(batch, np.full_like(out, -1.0), lr=2.0**-13)
            store.end_step()
        moved[weights] = float(store.export_dense("t", ids).mean()) - 1.0
    assert moved["bf16"] == pytest.approx(moved["fp32"], rel=0.02)


@pytest.mark.parametrize("shape", ["prefix", "free"])
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
def test_resume_and_change_of_format(tmp_path: Path, shape: str, optimizer: str) -> None:
    def make(weights: str, **fields: Any) -> FiitedStore:
        return build("native", weights=weights, optimizer=optimizer, shape=shape, **fields)

    one = make("bf16")
    train(one, 20)
    checkpoint.save(one, tmp_path / "half")
    other, wide = make("bf16"), make("fp32")
    for store in (other, wide):
        checkpoint.load(store, tmp_path / "half")
        assert all(np.array_equal(a, b) for a, b in zip(vectors(one), vectors(store)))
    for store in (one, other):
        train(store, 10)
    assert_equal(one, other)
    train(wide, 5)
    checkpoint.save(wide, tmp_path / "wide")
    narrow = make("bf16")
    checkpoint.load(narrow, tmp_path / "wide")
    narrow.verify()
    for ours, theirs in zip(vectors(narrow), vectors(wide)):
        assert np.array_equal(ours, round_nearest(theirs))


def test_layout_does_not_change_the_noise() -> None:
    """With room for every chunk both layouts agree."""
    fields = {"weights": "bf16", "budget_slots": 5000, "admit_after": 0, "slack": 0.0}
    one, other = (build("native", shape=shape, **fields) for shape in ("prefix", "free"))
    for store in (one, other):
        train(store, 15)
    assert all(np.array_equal(a, b) for a, b in zip(vectors(one), vectors(other)))


@pytest.mark.parametrize(("optimizer", "ratio"), [("rowwise_adagrad", 2.0), ("adam", 1.2)])
def test_slots_are_as_small_as_they_say(optimizer: str, ratio: float) -> None:
    live = {}
    for weights in ("fp32", "bf16"):
        store = build("native", weights=weights, optimizer=optimizer)
        train(store, 15)
        counters = store.engine.counters()
        live[weights] = counters["pool_live"] / counters["alive"]
    assert live["fp32"] / live["bf16"] == pytest.approx(ratio)
    with pytest.raises(ConfigError, match="weights"):
        FiitedConfig(budget_slots=9, weights="fp16")  # type: ignore[arg-type]
