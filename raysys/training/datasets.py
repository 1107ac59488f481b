"""Small labelled data sets for training experiments: MNIST-1D, Fashion-MNIST and digits.

MNIST-1D is generated here (Greydanus & Kobak, "Scaling Down Deep Learning with MNIST-1D", the same
templates and distortions as the ``mnist1d`` package, vectorised; another random stream, so equal
in distribution and not bit by bit). Fashion-MNIST is read from its four IDX files; digits ships
inside scikit-learn. All return standardised float32 inputs with a channel axis.
"""

from __future__ import annotations

import dataclasses
import gzip
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysys.errors import CapabilityError, ConfigError, DataError, StorageError

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

SIGNAL_LENGTH = 40
_GRID = 72  # the package's template_len + largest padding
_PADDING = (36, 60)
_FASHION_FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")

# One row of heights per digit, evenly spaced in time (table of the MNIST-1D paper).
_TEMPLATES = (
    (5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5),
    (5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5),
    (5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5),
    (5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5),
    (5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5),
    (5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5),
    (5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5),
    (5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5),
)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class LabelledArrays:
    """Inputs with labels, row by row.

    Args:
        x: float32, shape (N, channels, ...), standardised.
        y: int64 class indices, shape (N,).
        ids: int64 stable example ids, shape (N,); they survive filtering and shuffling.
        classes: number of classes of the whole data set.
    """

    x: FloatArray
    y: IntArray
    ids: IntArray
    classes: int

    def __len__(self) -> int:
        return len(self.y)

    def take(self, rows: NDArray[Any]) -> LabelledArrays:
        """Return the rows at these positions, ids kept."""
        return LabelledArrays(self.x[rows], self.y[rows], self.ids[rows], self.classes)

    def with_labels(self, y: IntArray) -> LabelledArrays:
        """Return the same inputs with other labels (for example, with injected noise)."""
        return dataclasses.replace(self, y=np.asarray(y, np.int64))


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Split:
    """A data set in its training and its test part."""

    name: str
    train: LabelledArrays
    test: LabelledArrays


def mnist1d(train_rows: int = 4000, test_rows: int = 1000, seed: int = 42) -> Split:
    """Generate MNIST-1D: ten classes of 40-point signals, shape (N, 1, 40), classes balanced.

    Raises:
        ConfigError: a row count is below one.
    """
    for field, rows in (("train_rows", train_rows), ("test_rows", test_rows)):
        if rows < 1:
            raise ConfigError(field, rows, "at least 1 row")
    rng = np.random.default_rng(seed)
    total = train_rows + test_rows
    y = rng.permutation(np.arange(total) % 10).astype(np.int64)
    signal = _distort(_templates()[y], rng)
    signal = (signal - signal.mean()) / signal.std()
    x = signal.astype(np.float32)[:, None, :]
    return _cut("mnist1d", x, y, 10, train_rows)


def fashion_mnist(
    root: Path | None,
    train_rows: int = 60_000,
    test_rows: int = 10_000,
    pool: int = 1,
    seed: int = 0,
) -> Split:
    """Read Fashion-MNIST: shape (N, 1, 28/pool, 28/pool).

    Args:
        root: folder that contains ``fashion-mnist/`` (see ``docs/data.md``).
        train_rows: a fixed random subset of this many training images, drawn by ``seed``.
        test_rows: the first this many test images.
        pool: averaging over ``pool x pool`` pixels.

    Raises:
        CapabilityError: the files are not on this machine.
        DataError: a file is truncated or of another kind.
    """
    folder = root / "fashion-mnist" if root is not None else None
    if folder is None or not (folder / f"{_FASHION_FILES[0]}-ubyte.gz").is_file():
        raise CapabilityError(
            "Fashion-MNIST",
            f"its IDX files are not in {folder}" if folder else "no data folder on this machine",
            "Set RAYSYS_DATA to a folder with fashion-mnist/*-ubyte.gz (see docs/data.md)",
        )
    images, labels, test_images, test_labels = (
        read_idx(folder / f"{name}-ubyte.gz") for name in _FASHION_FILES
    )
    chosen = np.sort(np.random.default_rng(seed).permutation(len(images))[:train_rows])
    train = LabelledArrays(
        _pixels(images[chosen], pool), labels[chosen].astype(np.int64), chosen, 10
    )
    held = slice(0, test_rows)
    test_ids = np.arange(len(images), len(images) + len(test_images[held]))
    test = LabelledArrays(
        _pixels(test_images[held], pool), test_labels[held].astype(np.int64), test_ids, 10
    )
    return Split("fashion-mnist", train, test)


def digits(test_rows: int = 397, seed: int = 0) -> Split:
    """Load scikit-learn's 1,797 digits: shape (N, 1, 8, 8), split by a seeded permutation."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(seed).permutation(len(bunch.target))
    x = np.asarray(bunch.images, np.float32)[order]
    x = (x - x.mean()) / x.std()
    y = np.asarray(bunch.target, np.int64)[order]
    return _cut("digits", x[:, None], y, 10, len(y) - test_rows)


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes (``.gz`` or plain) into an array of its stated shape.

    Raises:
        StorageError: the file cannot be read.
        DataError: wrong magic number, or fewer bytes than the header promises.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError) as error:
        raise DataError(str(path), f"not a whole gzip file ({error})", "Fetch it again") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(str(path), reason, "Give an existing IDX file") from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise DataError(str(path), "not an IDX file of unsigned bytes", "Give an idx-ubyte file")
    dimensions = raw[3]
    shape = np.frombuffer(raw, ">u4", dimensions, 4) if len(raw) >= 4 + 4 * dimensions else ()
    start = 4 + 4 * dimensions
    wanted = int(np.prod(shape, dtype=np.int64)) if len(shape) else -1
    if len(raw) - start != wanted:
        raise DataError(
            str(path), f"{len(raw) - start} bytes of data, header says {wanted}", "Fetch it again"
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape([int(size) for size in shape])


def flip_labels(
    y: IntArray, share: float, classes: int, seed: int
) -> tuple[IntArray, NDArray[np.bool_]]:
    """Replace a share of labels by another class, uniformly; returns labels and the flipped mask.

    Raises:
        ConfigError: ``share`` is outside [0, 1], or there is only one class to flip to.
    """
    if not 0 <= share <= 1:
        raise ConfigError("share", share, "a number in [0, 1]")
    if classes < 2:
        raise ConfigError("classes", classes, "at least two classes")
    rng = np.random.default_rng(seed)
    flipped = np.zeros(len(y), np.bool_)
    flipped[rng.permutation(len(y))[: round(share * len(y))]] = True
    noisy = y.copy()
    noisy[flipped] = (y[flipped] + rng.integers(1, classes, int(flipped.sum()))) % classes
    return noisy, flipped


def _cut(name: str, x: FloatArray, y: IntArray, classes: int, train_rows: int) -> Split:
    ids = np.arange(len(y), dtype=np.int64)
    whole = LabelledArrays(x, y, ids, classes)
    return Split(name, whole.take(ids[:train_rows]), whole.take(ids[train_rows:]))


def _pixels(images: NDArray[np.uint8], pool: int) -> FloatArray:
    rows, height, width = images.shape
    if pool < 1 or height % pool or width % pool:
        raise ConfigError("pool", pool, f"a divisor of {height} and {width}")
    scaled = images.astype(np.float32) / 255.0
    scaled = scaled.reshape(rows, height // pool, pool, width // pool, pool).mean((2, 4))
    # Published mean and standard deviation of the training pixels.
    standard: FloatArray = ((scaled - 0.2860) / 0.3530).astype(np.float32)[:, None]
    return standard


def _templates() -> NDArray[np.float64]:
    heights = np.asarray(_TEMPLATES, np.float64)
    heights -= heights.mean(1, keepdims=True)
    heights /= heights.std(1, keepdims=True)
    return (heights - heights[:, :1]) / 6.0


def _distort(signal: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Pad and dilate, scale, translate, add both noises, shear and subsample, as in the paper."""
    from scipy.ndimage import gaussian_filter1d

    rows, length = signal.shape
    padded = np.zeros((rows, length + _PADDING[1] + 1))
    padded[:, :length] = signal + 1e-8  # so that "not padding" can be told from a zero height
    real_length = length + rng.integers(_PADDING[0], _PADDING[1] + 1, rows)
    position = np.linspace(0, 1, _GRID)[None, :] * (real_length[:, None] - 1)
    wide = _interpolate(padded, position)
    wide *= 1 + 0.4 * (rng.random((rows, 1)) - 0.5)
    shift = rng.integers(0, 48, (rows, 1))
    wide = np.take_along_axis(wide, (np.arange(_GRID)[None, :] - shift) % _GRID, axis=1)
    smooth = gaussian_filter1d(0.25 * rng.standard_normal(wide.shape), 2.0, axis=1)
    wide = np.where(wide != 0, wide, smooth) + 0.02 * rng.standard_normal(wide.shape)
    tilt = 0.75 * (rng.random((rows, 1)) - 0.5)
    wide -= tilt * np.linspace(-0.5, 0.5, _GRID)[None, :]
    final = np.linspace(0, _GRID - 1, SIGNAL_LENGTH)[None, :]
    return _interpolate(wide, np.repeat(final, rows, axis=0))


def _interpolate(signal: NDArray[np.float64], position: NDArray[np.float64]) -> NDArray[np.float64]:
    """Linear interpolation of each row at its fractional positions; both (rows, points)."""
    left = np.minimum(position.astype(np.int64), signal.shape[1] - 2)
    weight = position - left
    low = np.take_along_axis(signal, left, axis=1)
    high = np.take_along_axis(signal, left + 1, axis=1)
    between: NDArray[np.float64] = low + weight * (high - low)
    return between
