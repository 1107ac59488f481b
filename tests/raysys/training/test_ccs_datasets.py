"""The data sets: shapes, balance, determinism, IDX files and their damage."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from raysys import machine
from raysys.errors import CapabilityError, ConfigError, DataError, StorageError
from raysys.training.datasets import digits, fashion_mnist, flip_labels, mnist1d, read_idx


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim])
    return header + b"".join(int(n).to_bytes(4, "big") for n in array.shape) + array.tobytes()


def test_mnist1d_is_standardised_balanced_and_seeded() -> None:
    split = mnist1d(500, 100, seed=3)
    x = np.concatenate([split.train.x, split.test.x])
    assert x.shape == (600, 1, 40)
    assert float(x.mean()) == pytest.approx(0, abs=1e-5)
    assert float(x.std()) == pytest.approx(1, abs=1e-4)
    assert np.bincount(np.concatenate([split.train.y, split.test.y])).tolist() == [60] * 10
    assert len(np.intersect1d(split.train.ids, split.test.ids)) == 0
    np.testing.assert_array_equal(split.train.x, mnist1d(500, 100, seed=3).train.x)
    assert not np.array_equal(split.train.x, mnist1d(500, 100, seed=4).train.x)
    with pytest.raises(ConfigError, match="train_rows"):
        mnist1d(0, 1)


def test_mnist1d_has_the_published_statistics() -> None:
    """Spread and roughness per class, as measured on the published package's 5,000 signals."""
    train = mnist1d(5000, 10, seed=0).train
    spread = [float(train.x[train.y == c].std()) for c in range(10)]
    published = [1.196, 0.873, 0.835, 1.009, 0.881, 0.838, 1.191, 0.877, 1.0, 0.899]
    np.testing.assert_allclose(spread, published, atol=0.04)
    rough = np.abs(np.diff(train.x, axis=2)).mean((1, 2))
    means = [float(rough[train.y == c].mean()) for c in range(10)]
    wanted = [0.413, 0.407, 0.407, 0.502, 0.399, 0.408, 0.412, 0.414, 0.502, 0.437]
    np.testing.assert_allclose(means, wanted, atol=0.015)


def test_digits_splits_by_seed() -> None:
    split = digits()
    assert len(split.train) == 1400
    assert split.test.x.shape == (397, 1, 8, 8)
    assert not np.array_equal(split.test.y, digits(seed=1).test.y)


def test_fashion_mnist_reads_the_published_files() -> None:
    root = machine.data_dir()
    if root is None or not (root / "fashion-mnist").is_dir():
        pytest.skip("the Fashion-MNIST files are not on this machine (see docs/data.md)")
    split = fashion_mnist(root, 300, 200, pool=2)
    assert split.train.x.shape == (300, 1, 14, 14)
    assert split.test.ids[0] == 60_000
    np.testing.assert_array_equal(split.test.y[:5], [9, 2, 1, 1, 6])
    with pytest.raises(ConfigError, match="pool"):
        fashion_mnist(root, 10, 10, pool=3)


def test_fashion_mnist_from_small_files_of_the_same_format(tmp_path: Path) -> None:
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    images, labels = np.full((4, 28, 28), 51, np.uint8), np.arange(4, dtype=np.uint8)
    for name, array in (("train-images-idx3", images), ("train-labels-idx1", labels)):
        (folder / f"{name}-ubyte.gz").write_bytes(gzip.compress(idx(array)))
        (folder / f"{name.replace('train', 't10k')}-ubyte.gz").write_bytes(
            gzip.compress(idx(array))
        )
    split = fashion_mnist(tmp_path, 3, 2)
    assert split.train.x.shape == (3, 1, 28, 28)
    assert float(split.train.x[0, 0, 0, 0]) == pytest.approx((0.2 - 0.2860) / 0.3530)
    assert split.test.ids.tolist() == [4, 5]
    with pytest.raises(CapabilityError, match="RAYSYS_DATA"):
        fashion_mnist(tmp_path / "none")
    with pytest.raises(CapabilityError, match="no data folder"):
        fashion_mnist(None)


def test_damaged_idx_files(tmp_path: Path) -> None:
    good = idx(np.arange(6, dtype=np.uint8).reshape(2, 3))
    path = tmp_path / "file.idx"
    path.write_bytes(good)
    assert read_idx(path).tolist() == [[0, 1, 2], [3, 4, 5]]
    for content, text in (
        (good[:-1], "header says 6"),
        (good[:6], "header says"),
        (b"\0\0\x0d\x01" + good[4:], "not an IDX"),
        (b"", "not an IDX"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=text):
            read_idx(path)
    packed = tmp_path / "file.gz"
    packed.write_bytes(gzip.compress(good)[:-4])
    with pytest.raises(DataError, match="gzip"):
        read_idx(packed)
    with pytest.raises(StorageError, match="No such file"):
        read_idx(tmp_path / "absent")


def test_flipped_labels_always_change() -> None:
    y = np.arange(1000) % 10
    noisy, flipped = flip_labels(y, 0.2, 10, seed=1)
    assert int(flipped.sum()) == 200
    assert ((noisy != y) == flipped).all()
    assert noisy.max() < 10
    with pytest.raises(ConfigError, match="share"):
        flip_labels(y, 1.2, 10, 0)
    with pytest.raises(ConfigError, match="two classes"):
        flip_labels(y, 0.1, 1, 0)
