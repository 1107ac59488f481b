"""Coreset folders, the data set view and the sampler."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from raysys.errors import ConfigError, DataError, StorageError
from raysys.training.ccs.coreset import (
    Coreset,
    CoresetDataset,
    CoresetSampler,
    WithIndex,
    save_coreset,
)
from raysys.training.ccs.selection import SelectionConfig, select_ccs
from raysys.training.ccs.store import write_scores
from raysys.training.ccs.table import ScoreTable


@pytest.fixture
def table() -> ScoreTable:
    rng = np.random.default_rng(0)
    return ScoreTable(np.arange(100), {"aum": rng.normal(size=100)}, rng.integers(0, 3, 100))


def save(folder: Path, table: ScoreTable, **more: object) -> Coreset:
    config = SelectionConfig(beta=0.1, seed=4)
    return save_coreset(str(folder), select_ccs(table, 20, config), config, **more)  # type: ignore[arg-type]


def test_round_trip_and_manifest(tmp_path: Path, table: ScoreTable) -> None:
    saved = save(tmp_path / "a", table, weights=True, extra={"auc_pr": 1.5})
    loaded = Coreset.load(str(tmp_path / "a"))
    np.testing.assert_array_equal(loaded.ids, saved.ids)
    assert loaded.weights is not None
    assert loaded.manifest == json.loads(json.dumps(saved.manifest))
    for key, value in (("m", 20), ("rows", 100), ("beta", 0.1), ("auc_pr", 1.5)):
        assert loaded.manifest[key] == value
    assert loaded.manifest["config"]["seed"] == 4
    assert sum(loaded.manifest["strata"]["quotas"]) == 20
    assert sum(loaded.manifest["classes"]["after"]) == 20
    assert "numpy" in loaded.manifest["packages"]
    loaded.verify(table.ids, table.labels)


def test_another_data_set_is_refused(tmp_path: Path, table: ScoreTable) -> None:
    coreset = save(tmp_path / "a", table)
    assert table.labels is not None
    changed = table.labels.copy()
    changed[5] = (changed[5] + 1) % 3
    order = np.random.default_rng(1).permutation(100)
    coreset.verify(table.ids[order], table.labels[order])  # shuffled with its ids: the same data
    for ids, labels in (
        (table.ids, changed),
        (table.ids, table.labels[order]),
        (table.ids[:-1], table.labels[:-1]),
    ):
        with pytest.raises(DataError, match="fingerprint"):
            CoresetDataset(list(ids), coreset, ids=ids, labels=labels)


def test_a_second_writer_loses_and_leaves_nothing(tmp_path: Path, table: ScoreTable) -> None:
    save(tmp_path / "a", table)
    with pytest.raises(StorageError, match="already exists"):
        save(tmp_path / "a", table)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        save(tmp_path / "file" / "b", table)


@pytest.mark.parametrize(
    ("code", "message"), [(errno.ENOSPC, "no space left"), (errno.EROFS, "not permitted")]
)
def test_a_full_or_read_only_disk_leaves_no_coreset_and_the_old_scores(
    tmp_path: Path, table: ScoreTable, monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    scores = tmp_path / "scores.parquet"
    write_scores(str(scores), table)
    before = scores.read_bytes()

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(pq, "write_table", fail)
    with pytest.raises(StorageError, match=message):
        save(tmp_path / "a", table)
    with pytest.raises(StorageError, match=message):
        write_scores(str(scores), table)
    assert scores.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["scores.parquet"]


def test_an_interrupt_leaves_no_coreset(
    tmp_path: Path, table: ScoreTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pq, "write_table", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "a", table)
    assert not list(tmp_path.iterdir())


def test_damage_is_found(tmp_path: Path, table: ScoreTable) -> None:
    folder = tmp_path / "a"
    save(folder, table)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "selection": "other"}))
    with pytest.raises(DataError, match="two selections"):
        Coreset.load(str(folder))
    (folder / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(DataError, match="version 99"):
        Coreset.load(str(folder))
    (folder / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        Coreset.load(str(folder))
    with pytest.raises(StorageError, match="does not exist"):
        Coreset.load(str(tmp_path / "none"))


def test_data_set_view(tmp_path: Path, table: ScoreTable) -> None:
    coreset = save(tmp_path / "a", table)
    view = CoresetDataset(WithIndex([f"x{i}" for i in range(100)]), coreset)
    assert len(view) == 20
    assert [view[i] for i in range(20)] == [(i, f"x{i}") for i in coreset.ids.tolist()]
    assert WithIndex([(1, 2)])[0] == (0, 1, 2)
    assert len(WithIndex([1, 2])) == 2
    with pytest.raises(ConfigError, match="one per example"):
        CoresetDataset([1, 2], coreset, ids=np.arange(3))
    with pytest.raises(ConfigError, match="all 20 ids"):
        CoresetDataset([1, 2], coreset)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_sampler_covers_evenly_and_resumes(world: int) -> None:
    seen = []
    for rank in range(world):
        sampler = CoresetSampler(20, seed=3, rank=rank, world=world)
        sampler.set_epoch(2)
        full = list(sampler)
        assert len(full) == len(sampler)
        sampler.set_epoch(2)
        running = iter(sampler)
        head = [next(running) for _ in range(4)]
        resumed = CoresetSampler(20, seed=3, rank=rank, world=world)
        resumed.load_state_dict(sampler.state_dict())
        assert head + list(resumed) == full
        seen += full
    assert set(seen) == set(range(20))
    assert list(CoresetSampler(3, shuffle=False)) == [0, 1, 2]


def test_sampler_resumes_with_another_world_size() -> None:
    """Two ranks consumed ten of twenty; four ranks take exactly the other ten (and padding)."""
    two = [CoresetSampler(20, seed=1, rank=rank, world=2) for rank in range(2)]
    used: list[int] = []
    for sampler in two:
        running = iter(sampler)
        used += [next(running) for _ in range(5)]
    rest: list[int] = []
    for rank in range(4):
        sampler = CoresetSampler(20, seed=1, rank=rank, world=4)
        sampler.load_state_dict(two[0].state_dict())
        rest += list(sampler)
    assert set(used) | set(rest) == set(range(20))
    assert len(rest) == 12  # ten, and two of padding


def test_sampler_rejects_bad_arguments() -> None:
    with pytest.raises(ConfigError, match="rank"):
        CoresetSampler(5, rank=2, world=2)
    with pytest.raises(ConfigError, match="size"):
        CoresetSampler(0)
    with pytest.raises(ConfigError, match="seed"):
        CoresetSampler(5, seed=1).load_state_dict({"seed": 2, "epoch": 0, "consumed": 0})
