"""Data that people bring, and files that are missing or damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raysys.config import config_from_dict
from raysys.errors import CapabilityError, ConfigError, DataError
from raysys.federated.core.datasets import read_idx
from raysys.federated.core.own_data import from_torch, load_npz_data, load_parquet_data
from raysys.federated.core.recipe import DataConfig, FederatedConfig, load_data


def test_your_own_archive(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "own.npz"
    np.savez(
        path, inputs=rng.random((50, 4)), targets=rng.integers(0, 3, 50), client=np.arange(50) % 7
    )
    data = load_npz_data(path)
    assert (len(data.targets), len(data.test_targets), data.classes) == (40, 10, 3)
    assert data.keys is not None
    config = config_from_dict(FederatedConfig, {"data": {"name": "npz", "path": str(path)}})
    assert load_data(config.data, 0, None).name == "own"
    np.savez(tmp_path / "objects.npz", inputs=np.array([{}]), targets=np.zeros(1))
    with pytest.raises(DataError):
        load_npz_data(tmp_path / "objects.npz")
    np.savez(tmp_path / "half.npz", inputs=np.zeros(3))
    with pytest.raises(DataError, match="targets"):
        load_npz_data(tmp_path / "half.npz")


def test_your_own_table(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    columns = {"a": rng.random(50), "b": rng.random(50), "target": rng.integers(0, 3, 50)}
    path = tmp_path / "own.parquet"
    pq.write_table(pa.table({**columns, "client": [f"user {n % 7}" for n in range(50)]}), path)
    data = load_parquet_data(path)
    assert data.inputs.shape == (40, 2)
    assert data.classes == 3
    assert data.keys is not None
    assert load_data(DataConfig(name="parquet", path=str(path)), 0, None).name == "own"
    lists = pa.table({"x": [[1.0, 2.0]] * 10, "target": rng.random(10)})
    pq.write_table(lists, tmp_path / "lists.parquet")
    assert load_parquet_data(tmp_path / "lists.parquet").inputs.shape == (8, 2)
    for bad, word in (
        ({"a": [1.0]}, "target"),
        ({"target": [1]}, "no input"),
        ({"a": ["x"], "target": [1]}, "Only numbers"),
        ({"a": [None, 1.0], "target": [1, 0]}, "missing values"),
    ):
        pq.write_table(pa.table(bad), tmp_path / "bad.parquet")
        with pytest.raises(DataError, match=word):
            load_parquet_data(tmp_path / "bad.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"none")
    with pytest.raises(DataError):
        load_parquet_data(tmp_path / "bad.parquet")


def test_your_own_torch_data_set() -> None:
    x, y = torch.rand(25, 3), torch.arange(25) % 4
    data = from_torch(torch.utils.data.TensorDataset(x, y), keys=list(range(25)))
    assert (data.inputs.shape, data.classes, len(data.test_targets)) == ((20, 3), 4, 5)
    with pytest.raises(ConfigError, match="map-style"):
        from_torch(torch.utils.data.TensorDataset(x[:0], y[:0]))
    ragged = [(np.zeros(2), 0), (np.zeros(3), 1)]
    with pytest.raises(ConfigError, match="one shape"):
        from_torch(ragged)  # type: ignore[arg-type]


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(CapabilityError, match="data folder"):
        load_data(DataConfig(name="mnist"), 0, None)
    with pytest.raises(CapabilityError, match="does not exist"):
        load_data(DataConfig(name="mnist"), 0, tmp_path)
    (tmp_path / "x.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError):
        read_idx(tmp_path / "x.gz", 2051)
    with pytest.raises(ConfigError, match="path"):
        DataConfig(name="npz")
