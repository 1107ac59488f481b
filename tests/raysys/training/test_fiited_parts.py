"""Click logs, serving tables, budget controllers and the drift detector."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from raysys.errors import ConfigError, DataError, StorageError
from raysys.training.fiited import FiitedConfig, FiitedStore, TableSpec, hash_strings
from raysys.training.fiited.budget import DriftDetector, Guard, GuardConfig, Ramp
from raysys.training.fiited.clicks import MISSING, ClickLog
from raysys.training.fiited.packed import PackConfig, PackedTable, export_packed

ROWS = pa.table(
    {
        "label": [1, 0, 1, 0, 0],
        "user": [5, 6, None, 5, 2**40],
        "city": ["a", "b", "a", None, "c"],
        "price": [1.0, 2.5, -3.0, None, 0.0],
    }
)


def test_parquet_and_csv_give_the_same_rows(tmp_path: Path) -> None:
    pq.write_table(ROWS, tmp_path / "x.parquet")
    pacsv.write_csv(ROWS, tmp_path / "x.csv")
    logs = [ClickLog([str(tmp_path / name)]) for name in ("x.parquet", "x.csv")]
    for log in logs:
        assert log.schema.categorical == ("user", "city")
        assert log.schema.dense == ("price",)
        (rows,) = log.batches(10)
        assert rows.ids[:, 0].tolist() == [5, 6, MISSING, 5, 2**40]
        assert rows.ids[3, 1] == MISSING
        assert rows.ids[0, 1] == hash_strings(["a"])[0]
        np.testing.assert_allclose(rows.dense[:, 0], [0.6931, 1.2528, -1.3863, 0, 0], atol=1e-4)
        assert rows.labels.tolist() == [1, 0, 1, 0, 0]
    parts = list(logs[0].batches(2, skip=1))
    assert [len(p) for p in parts] == [2, 2]
    assert np.concatenate([p.labels for p in parts]).tolist() == [0, 1, 0, 0]


def test_criteo_lines(tmp_path: Path) -> None:
    line = "\t".join(["1", "3", "", *["0"] * 11, "68fd1e64", "", *["ff"] * 24])
    (tmp_path / "day_0.tsv").write_text(f"{line}\n{line.replace('1', '0', 1)}\n")
    log = ClickLog([str(tmp_path)], format_="criteo")
    (rows,) = log.batches(8)
    assert rows.ids.shape == (2, 26)
    assert rows.dense.shape == (2, 13)
    assert rows.ids[0, 1] == MISSING
    assert rows.ids[0, 0] == hash_strings(["68fd1e64"])[0]
    assert rows.labels.tolist() == [1, 0]


def test_bad_logs_are_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        ClickLog([str(tmp_path / "none.parquet")])
    pq.write_table(ROWS.set_column(0, "label", [pa.array([0, 1, 2, 0, 1])]), tmp_path / "l.parquet")
    with pytest.raises(DataError, match=r"label is 2.0 in row 2"):
        list(ClickLog([str(tmp_path / "l.parquet")]).batches(4))
    bad = ROWS.set_column(3, "price", [pa.array([0.0, 1.0, 2.0, 3.0, float("inf")])])
    pq.write_table(bad, tmp_path / "d.parquet")
    with pytest.raises(DataError, match="row 4"):
        list(ClickLog([str(tmp_path / "d.parquet")]).batches(4))
    pq.write_table(ROWS, tmp_path / "ok.parquet")
    with pytest.raises(DataError, match="no column 'item'"):
        ClickLog([str(tmp_path / "ok.parquet")], categorical=["item"])
    with pytest.raises(DataError, match="type double"):
        list(ClickLog([str(tmp_path / "ok.parquet")], categorical=["price"]).batches(4))
    with pytest.raises(ConfigError):
        ClickLog([str(tmp_path / "ok.parquet")], categorical=["user"], dense=["user"])
    (tmp_path / "t.csv").write_text("label,user\n1,5\n0,5,7\n")
    with pytest.raises(DataError):
        list(ClickLog([str(tmp_path / "t.csv")]).batches(4))
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "ok.parquet").read_bytes()[:200])
    with pytest.raises(DataError):
        ClickLog([str(tmp_path / "cut.parquet")])


def trained() -> FiitedStore:
    tables = (TableSpec(name="a", dim=16, rows=200), TableSpec(name="b", dim=8, rows=50))
    config = FiitedConfig(chunk=4, budget_slots=90, interval=5, page_bytes=65536, id_space="bits")
    store = FiitedStore(config, tables, engine="native")
    rng = np.random.default_rng(0)
    for _ in range(40):
        ids = [np.minimum(rng.zipf(1.3, 64), t.rows) for t in tables]
        out, batch = store.lookup(ids, train=True)
        store.update(batch, rng.normal(size=out.shape).astype(np.float32))
        store.end_step()
    return store


@pytest.mark.parametrize(("values", "tolerance"), [("fp32", 0), ("bf16", 2**-8), ("int8", 0.01)])
def test_serving_table_answers_like_the_store(
    tmp_path: Path, values: str, tolerance: float
) -> None:
    store = trained()
    manifest = export_packed(store, tmp_path, PackConfig(values=values))
    assert manifest["rows"] == store.engine.counters()["rows"]
    table = PackedTable(tmp_path)
    ids = np.stack([np.arange(60), np.arange(60)], 1)
    expected, _ = store.lookup(list(ids.T))
    scale = max(float(np.abs(expected).max()), 1e-9)
    assert np.abs(table.lookup(ids) - expected).max() <= tolerance * scale
    assert len(np.unique(store.dims("a", np.arange(60)))) > 1  # rows of several lengths
    with pytest.raises(ConfigError):
        PackConfig(values="int4")
    damaged = bytearray((tmp_path / "values.bin").read_bytes())
    damaged[3] ^= 1
    (tmp_path / "values.bin").write_bytes(damaged)
    with pytest.raises(DataError, match=r"values\.bin"):
        PackedTable(tmp_path)


def test_an_empty_serving_table_gives_zeros(tmp_path: Path) -> None:
    store = FiitedStore(
        FiitedConfig(budget_slots=8), (TableSpec(name="a", dim=16),), engine="native"
    )
    export_packed(store, tmp_path, PackConfig())
    assert not PackedTable(tmp_path).lookup(np.arange(4).reshape(4, 1)).any()


def test_ramp_is_cubic_and_ends_at_the_ratio() -> None:
    ramp = Ramp(end=0.8, steps=10, full_slots=1000)
    assert ramp.slots(0) == 1000
    assert ramp.ratio(5) == pytest.approx(0.8 * 7 / 8)
    assert ramp.slots(10) == ramp.slots(99) == 200


def test_guard_raises_at_once_and_lowers_with_patience() -> None:
    guard = Guard(GuardConfig(tol=0.001, patience=3, cap_slots=1100, floor_slots=950), 1000)
    assert guard.check(0.5, 0.502).slots == 1050
    assert guard.check(0.5, 0.502).slots == 1100  # the cap
    assert [guard.check(0.5, 0.5).action for _ in range(3)] == ["hold", "hold", "lower"]
    assert guard.check(0.5, 0.5005).action == "hold"  # between the marks: patience starts over
    for _ in range(20):
        guard.check(0.5, 0.5)
    assert guard.slots == 950
    with pytest.raises(ConfigError):
        GuardConfig(cap_slots=1, floor_slots=2)


def test_drift_detector_wants_a_lasting_rise() -> None:
    rng = np.random.default_rng(0)
    calm = DriftDetector()
    assert not any(calm.update(0.5 + 0.002 * rng.normal()) for _ in range(60))
    drift = DriftDetector()
    found = [drift.update(0.5 if i < 20 else 0.53) for i in range(30)]
    assert found.index(True) in (20, 21, 22)
