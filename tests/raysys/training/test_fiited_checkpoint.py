"""Checkpoints: resume equals no interruption, and every kind of damage is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysys.errors import DataError, StorageError
from raysys.training.fiited import checkpoint
from raysys.training.fiited.config import FiitedConfig, TableSpec
from raysys.training.fiited.metrics import sightings, statistics
from raysys.training.fiited.store import FiitedStore

TABLES = (TableSpec(name="a", dim=16, rows=400), TableSpec(name="b", dim=8, rows=90))


def build(**fields: Any) -> FiitedStore:
    given = {"chunk": 4, "budget_slots": 300, "interval": 7, "optimizer": "adam"}
    return FiitedStore(FiitedConfig(**(given | fields)), TABLES, engine="native")


def train(store: FiitedStore, first: int, last: int) -> None:
    for index in range(first, last):
        rng = np.random.default_rng(index)
        out, batch = store.lookup([rng.zipf(1.3, 64) % 400, rng.zipf(1.3, 64) % 90], train=True)
        store.update(batch, rng.normal(size=out.shape).astype(np.float32))
        store.end_step()


def state(store: FiitedStore) -> list[Any]:
    ids = [np.arange(400), np.arange(90)]
    parts = [(store.export_dense(t.name, i), store.utility(t.name, i)) for t, i in zip(TABLES, ids)]
    return [array for part in parts for array in part]


@pytest.mark.parametrize("cadence", ["continuous", "interval"])
@pytest.mark.parametrize("shape", ["prefix", "free"])
def test_resume_equals_no_interruption(tmp_path: Path, cadence: Any, shape: Any) -> None:
    one = build(cadence=cadence, shape=shape)
    train(one, 0, 40)
    checkpoint.save(one, tmp_path / "c")
    other = build(cadence=cadence, shape=shape)
    checkpoint.load(other, tmp_path / "c")
    other.verify()
    assert all(np.array_equal(a, b) for a, b in zip(state(one), state(other)))
    for store in (one, other):
        train(store, 40, 70)
    assert one.engine.counters()["evicted"] > 0
    assert all(np.array_equal(a, b) for a, b in zip(state(one), state(other)))


COUNTS = ("admitted", "removed", "grown", "evicted", "refused", "regret", "lookups", "hits")


def counts(*stores: FiitedStore) -> dict[str, float]:
    return {n: sum(s.engine.counters()[n] for s in stores) for n in COUNTS}


def test_counts_go_on_after_a_resume(tmp_path: Path) -> None:
    one = build()
    train(one, 0, 40)
    checkpoint.save(one, tmp_path / "c")
    other = build()
    checkpoint.load(other, tmp_path / "c")
    for store in (one, other):
        train(store, 40, 70)
    assert counts(other) == counts(one)
    clocks = checkpoint._clock(one.engine), checkpoint._clock(other.engine)
    assert all(np.array_equal(clocks[0][name], clocks[1][name]) for name in clocks[0])
    assert counts(one)["regret"] > 0
    ours, whole = statistics(other), statistics(one)
    assert [ours[n] for n in ("rho", "hit_rate", "rows_seen", "sketch_hits")] == [
        whole[n] for n in ("rho", "hit_rate", "rows_seen", "sketch_hits")
    ]


@pytest.mark.parametrize("old", [1, 2, 3])
@pytest.mark.parametrize("new", [1, 2])
def test_counts_of_a_group_survive_another_number_of_shards(old: int, new: int) -> None:
    """Sums over shards stay, and rows that several shards know are not counted twice."""
    stores = [build() for _ in range(old)]
    for index, store in enumerate(stores):
        train(store, 10 * index, 10 * index + 10)
    seen = np.maximum.reduce([sightings(store)["registers"] for store in stores])
    fresh = [build() for _ in range(new)]
    for index, store in enumerate(fresh):
        engine = store.engine
        owned = np.arange(4096) * new // 4096 == index
        clocks = [checkpoint._clock(s.engine) for s in stores]
        checkpoint._set_history(engine, clocks, owned.astype(np.uint8))
        assert np.array_equal(sightings(store)["registers"], seen)
    assert counts(*fresh) == counts(*stores)


def test_a_checkpoint_without_counts_still_loads(tmp_path: Path) -> None:
    one = build()
    train(one, 0, 20)
    clock = checkpoint._clock(one.engine)
    old = {n: a for n, a in clock.items() if n not in ("totals", "registers", "signatures")}
    manifest = checkpoint._manifest(one, one.engine, {})
    pieces = (checkpoint._part_arrays(one.engine, *p) for p in checkpoint._pieces(one.engine))
    checkpoint._write(tmp_path / "c", manifest, pieces, old)
    other = build()
    checkpoint.load(other, tmp_path / "c")
    assert all(np.array_equal(a, b) for a, b in zip(state(one), state(other)))
    assert other.engine.counters()["lookups"] == 0


def test_another_layout_and_a_smaller_budget_load(tmp_path: Path) -> None:
    one = build()
    train(one, 0, 30)
    checkpoint.save(one, tmp_path / "c")
    free = build(shape="free", free_policy="lifo")
    checkpoint.load(free, tmp_path / "c")
    assert all(np.array_equal(a, b) for a, b in zip(state(one), state(free)))
    small = build(budget_slots=50)
    checkpoint.load(small, tmp_path / "c")
    small.verify()
    best = int(np.argmax(one.utility("a", np.arange(400)).max(axis=1)))
    assert small.engine.counters()["alive"] <= 50
    assert small.dims("a", [best])[0] == one.dims("a", [best])[0]


def test_shards_of_a_checkpoint_hold_every_row_once(tmp_path: Path) -> None:
    one = build()
    train(one, 0, 30)
    checkpoint.save(one, tmp_path / "c")
    rows = 0
    for low, high in ((0, 1000), (1000, 3000), (3000, 4096)):
        shard = build()
        rows += checkpoint.load(shard, tmp_path / "c", owned=range(low, high))
        shard.verify()
    assert rows == one.engine.counters()["rows"]


@pytest.mark.parametrize(
    "damage", ["truncate", "flip", "missing", "extra", "version", "mixer", "escape", "link", "json"]
)
def test_damage_is_refused_before_any_change(tmp_path: Path, damage: str) -> None:
    one = build()
    train(one, 0, 20)
    root = tmp_path / "c"
    checkpoint.save(one, root)
    part, manifest_path = root / "part-0000.arrow", root / "manifest.json"
    manifest = json.loads(manifest_path.read_text())
    data = bytearray(part.read_bytes())
    if damage == "truncate":
        part.write_bytes(data[:-9])
    elif damage == "flip":
        data[len(data) // 2] ^= 1
        part.write_bytes(data)
    elif damage == "missing":
        part.unlink()
    elif damage == "extra":
        (root / "part-9999.arrow").write_bytes(b"")
    elif damage == "link":
        shutil.move(part, tmp_path / "elsewhere")
        part.symlink_to(tmp_path / "elsewhere")
    elif damage == "json":
        manifest_path.write_text("{")
    else:
        if damage == "escape":
            manifest["parts"][0]["name"] = "../part-0000.arrow"
        else:
            manifest[damage] = 99
        manifest_path.write_text(json.dumps(manifest))
    fresh = build()
    with pytest.raises(DataError) as caught:
        checkpoint.load(fresh, root)
    assert str(tmp_path) in caught.value.path
    assert fresh.engine.counters()["rows"] == 0


def test_other_tables_and_absent_folders_are_refused(tmp_path: Path) -> None:
    checkpoint.save(build(), tmp_path / "c")
    other = FiitedStore(FiitedConfig(chunk=4, budget_slots=9), TABLES[:1], engine="native")
    with pytest.raises(DataError, match=r"states|tables"):
        checkpoint.load(other, tmp_path / "c")
    with pytest.raises(StorageError):
        checkpoint.load(build(), tmp_path / "nothing")


def test_interrupted_save_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = build()
    train(one, 0, 10)
    checkpoint.save(one, tmp_path / "c")
    before = state(one)
    train(one, 10, 20)

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_swap", full_disk)
    with pytest.raises(StorageError, match="No space"):
        checkpoint.save(one, tmp_path / "c")
    fresh = build()
    checkpoint.load(fresh, tmp_path / "c")
    assert all(np.array_equal(a, b) for a, b in zip(before, state(fresh)))
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
