"""Federated data sets: packaged digits, MNIST and Fashion-MNIST idx files.

Loaders return plain arrays; how they are dealt to clients is :mod:`partition`. Reading happens
only in functions that are given a path.
"""

from __future__ import annotations

import dataclasses
import gzip
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raysys.errors import CapabilityError, ConfigError, DataError
from raysys.federated.core.randomness import Purpose, generator
from raysys.federated.core.training import Samples, read_only_tensor

Inputs = npt.NDArray[Any]
IDX_IMAGES = 2051
IDX_LABELS = 2049


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FederatedData:
    """Samples of all clients, and a central test set.

    Args:
        inputs: float32 [N, ...] or int64 tokens [N, L]. targets: int64 [N] or float32 [N, out].
        keys: client key of each sample for the natural partition, or None.
        classes: number of classes; 0 for regression.
        vocabulary: different tokens, where inputs are tokens; 0 otherwise.

    Raises:
        ConfigError: lengths differ, labels out of range, or inputs that are not finite.
    """

    name: str
    inputs: Inputs
    targets: Inputs
    test_inputs: Inputs
    test_targets: Inputs
    classes: int
    keys: npt.NDArray[Any] | None = None
    vocabulary: int = 0

    def __post_init__(self) -> None:
        for name in ("inputs", "test_inputs"):
            object.__setattr__(self, name, _clean_inputs(name, getattr(self, name)))
        for name in ("targets", "test_targets"):
            object.__setattr__(self, name, _clean_targets(name, getattr(self, name), self.classes))
        if len(self.inputs) != len(self.targets) or len(self.test_inputs) != len(self.test_targets):
            raise ConfigError(
                "data.targets", (len(self.targets), len(self.test_targets)),
                f"as many as inputs: {len(self.inputs)} and {len(self.test_inputs)}",
            )  # fmt: skip
        if self.keys is not None and len(self.keys) != len(self.inputs):
            raise ConfigError("data.keys", len(self.keys), f"{len(self.inputs)} keys")

    def samples(self) -> Samples:
        """Training samples as tensors over the same memory."""
        return as_samples(self.inputs, self.targets)

    def test_samples(self) -> Samples:
        """Test samples as tensors over the same memory."""
        return as_samples(self.test_inputs, self.test_targets)


def as_samples(inputs: Inputs, targets: Inputs) -> Samples:
    """Tensors over arrays that may be read-only (as those of Ray's object store are)."""
    return Samples(read_only_tensor(inputs), read_only_tensor(targets))


def load_digits_data(seed: int = 0, image: bool = False) -> FederatedData:
    """scikit-learn's 1,797 digits of 8x8, in [0, 1], split 1,437 / 360 by ``seed``.

    Args:
        image: keep the shape [1, 8, 8] instead of 64 values.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = (bunch.images / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)
    inputs = pixels if image else pixels.reshape(-1, 64)
    return split("digits", inputs, bunch.target.astype(np.int64), 10, 360, seed)


def load_mnist_data(folder: Path, seed: int = 0, side: int = 14) -> FederatedData:
    """The 10,000 MNIST test images, split 8,000 / 2,000; ``side`` 14 pools 2x2.

    Raises:
        CapabilityError: the files are not there. DataError: they are damaged.
    """
    images = read_idx(folder / "t10k-images-idx3-ubyte.gz", IDX_IMAGES)
    labels = read_idx(folder / "t10k-labels-idx1-ubyte.gz", IDX_LABELS)
    inputs = _pool(images, side)
    return split("mnist", inputs, labels.astype(np.int64), 10, len(labels) // 5, seed)


def load_fashion_data(
    folder: Path, seed: int = 0, side: int = 14, train: int | None = None
) -> FederatedData:
    """Fashion-MNIST's own split; ``train`` keeps a seeded subset of the 60,000 samples.

    Raises:
        CapabilityError: the files are not there. DataError: they are damaged.
    """
    images = read_idx(folder / "train-images-idx3-ubyte.gz", IDX_IMAGES)
    labels = read_idx(folder / "train-labels-idx1-ubyte.gz", IDX_LABELS)
    test_images = read_idx(folder / "t10k-images-idx3-ubyte.gz", IDX_IMAGES)
    test_labels = read_idx(folder / "t10k-labels-idx1-ubyte.gz", IDX_LABELS)
    kept = generator(seed, Purpose.SPLIT).permutation(len(labels))[: train or len(labels)]
    return FederatedData(
        name="fashion-mnist",
        inputs=_pool(images[kept], side),
        targets=labels[kept].astype(np.int64),
        test_inputs=_pool(test_images, side),
        test_targets=test_labels.astype(np.int64),
        classes=10,
    )


def split(
    name: str,
    inputs: Inputs,
    targets: Inputs,
    classes: int,
    held_out: int,
    seed: int,
    keys: npt.NDArray[Any] | None = None,
    vocabulary: int = 0,
) -> FederatedData:
    """Hold out ``held_out`` samples, drawn by ``seed``, as the central test set."""
    order = generator(seed, Purpose.SPLIT).permutation(len(targets))
    test, train = order[:held_out], order[held_out:]
    return FederatedData(
        name=name,
        inputs=inputs[train],
        targets=targets[train],
        test_inputs=inputs[test],
        test_targets=targets[test],
        classes=classes,
        keys=None if keys is None else keys[train],
        vocabulary=vocabulary,
    )


def read_idx(path: Path, magic: int) -> npt.NDArray[np.uint8]:
    """Read a gzipped idx file of unsigned bytes.

    Raises:
        CapabilityError: the file is not there. DataError: damaged, or another kind of idx file.
    """
    must_exist(path)
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise DataError(str(path), str(error), "Fetch the file again") from error
    header = np.frombuffer(raw[:4], dtype=">i4")
    if len(header) != 1 or int(header[0]) != magic:
        raise DataError(str(path), f"its header is not {magic}", "Give an idx file of this kind")
    rank = magic % 256
    shape = tuple(int(n) for n in np.frombuffer(raw[4 : 4 + 4 * rank], dtype=">i4"))
    body = np.frombuffer(raw[4 + 4 * rank :], dtype=np.uint8)
    if body.size != np.prod(shape):
        raise DataError(str(path), f"holds {body.size} bytes for shape {shape}", "Fetch it again")
    return body.reshape(shape)


def _pool(images: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.float32]:
    """Images [n, h, h] as float32 [n, 1, side, side] in [0, 1], average-pooled."""
    height = images.shape[1]
    if side < 1 or height % side:
        raise ConfigError("data.side", side, f"a divisor of {height}")
    scaled = torch.from_numpy(images.astype(np.float32) / 255.0).unsqueeze(1)
    pooled: npt.NDArray[np.float32] = torch.nn.functional.avg_pool2d(scaled, height // side).numpy()
    return pooled


def _clean_inputs(name: str, inputs: Inputs) -> Inputs:
    if not len(inputs):
        raise ConfigError(f"data.{name}", 0, "at least one sample")
    if np.issubdtype(inputs.dtype, np.integer):
        return np.ascontiguousarray(inputs, dtype=np.int64)
    clean = np.ascontiguousarray(inputs, dtype=np.float32)
    if not np.isfinite(clean).all():
        raise ConfigError(f"data.{name}", "NaN or infinity", "finite numbers", "Clean the data")
    return clean


def _clean_targets(name: str, targets: Inputs, classes: int) -> Inputs:
    if classes == 0:
        values = np.ascontiguousarray(targets, dtype=np.float32)
        return values.reshape(len(values), -1)
    if not np.issubdtype(targets.dtype, np.integer):
        raise ConfigError(f"data.{name}", str(targets.dtype), "whole-number labels")
    labels = np.ascontiguousarray(targets, dtype=np.int64)
    wrong = labels[(labels < 0) | (labels >= classes)]
    if wrong.size:
        raise ConfigError(f"data.{name}", int(wrong[0]), f"labels from 0 to {classes - 1}")
    return labels


def must_exist(path: Path) -> None:
    """Raise a CapabilityError unless the file is there."""
    if not path.is_file():
        raise CapabilityError(
            f"data file {path.name}", f"{path} does not exist",
            "Point RAYSYS_DATA at the folder with the data sets, or use data.name=digits",
        )  # fmt: skip
