"""Examples for ``raysys train``: packaged sets, image folders, Parquet with images or text."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from jobs.train import pretrained
from jobs.train.config import DataConfig
from raysys import machine
from raysys.errors import ConfigError, DataError, StorageError
from raysys.training import datasets
from raysys.training.datasets import LabelledArrays, Split
from raysys.training.kgt.loop import TrainData

_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def load(config: DataConfig, seed: int) -> Split:
    """Load and split the examples.

    Raises:
        CapabilityError: a packaged set is not on this machine.
        StorageError: the path cannot be read.
        DataError: it holds no usable examples.
    """
    if config.source == "digits":
        split = datasets.digits(seed=seed)
    elif config.source == "mnist1d":
        split = datasets.mnist1d(config.train_rows or 4000, 4000)
    elif config.source == "fashion-mnist":
        rows = config.train_rows or 60_000
        split = datasets.fashion_mnist(machine.data_dir(), train_rows=rows)
    else:
        split = _outside(config, seed)
    if config.train_rows and config.train_rows < len(split.train):
        chosen = np.random.default_rng(seed).permutation(len(split.train))[: config.train_rows]
        return Split(split.name, split.train.take(np.sort(chosen)), split.test)
    return split


def tensors(arrays: LabelledArrays) -> TrainData:
    """The arrays as tensors that share their memory."""
    return TrainData(torch.from_numpy(arrays.x), torch.from_numpy(arrays.y), arrays.ids)


def _outside(config: DataConfig, seed: int) -> Split:
    path = Path(config.path)
    if not path.exists():
        raise StorageError(str(path), "does not exist", "Give an existing data.path")
    x, labels = _folder(path, config) if config.source == "folder" else _parquet(path, config)
    names, y = np.unique(labels, return_inverse=True)
    if len(names) < 2:
        raise DataError(str(path), f"holds {len(names)} classes", "Give at least two classes")
    order = np.random.default_rng(seed).permutation(len(y))
    held = max(1, round(config.test_share * len(y)))
    whole = LabelledArrays(x, y.astype(np.int64), np.arange(len(y)), len(names))
    return Split(path.name, whole.take(np.sort(order[held:])), whole.take(np.sort(order[:held])))


def _folder(path: Path, config: DataConfig) -> tuple[NDArray[Any], list[str]]:
    """Images in one sub-folder per class; the folder's name is the label."""
    found = sorted(
        file for file in path.glob("*/*") if file.suffix.lower() in _IMAGES and file.is_file()
    )
    if not found:
        raise DataError(str(path), "holds no images in sub-folders", "Expected CLASS/NAME.png")
    pixels = [_decode(file.read_bytes(), str(file), config) for file in found]
    return _standardised(np.stack(pixels)), [file.parent.name for file in found]


def _parquet(path: Path, config: DataConfig) -> tuple[NDArray[Any], list[Any]]:
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(str(path), f"not a Parquet file ({error})", "Check the path") from error
    names = table.column_names
    if "label" not in names or not {"image", "text"} & set(names):
        raise DataError(
            str(path), f"has the columns {names}", "Expected `label`, and `image` or `text`"
        )
    if not table.num_rows:
        raise DataError(str(path), "holds no rows", "Give a file with examples")
    labels = table.column("label").to_pylist()
    if "image" in names:
        values = table.column("image").to_pylist()
        pixels = [_decode(v, f"{path} row {i}", config) for i, v in enumerate(values)]
        return _standardised(np.stack(pixels)), labels
    texts = table.column("text").to_pylist()
    if config.tokenizer:
        return pretrained.tokens(config.tokenizer, texts, config.text_length), labels
    return _tokens(texts, config.text_length), labels


def _decode(content: Any, where: str, config: DataConfig) -> NDArray[np.float32]:
    """One encoded image as (channels, size, size) in [0, 1]."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(content, dict):  # the layout of Hugging Face's image columns
        content = content.get("bytes")
    try:
        with Image.open(io.BytesIO(content)) as image:
            mode = "L" if config.channels == 1 else "RGB"
            size = (config.image_size, config.image_size)
            pixels = np.asarray(image.convert(mode).resize(size), np.float32) / 255.0
    except (UnidentifiedImageError, OSError, TypeError) as error:
        raise DataError(where, f"not an image ({error})", "Remove it") from error
    return pixels[None] if config.channels == 1 else pixels.transpose(2, 0, 1)


def _standardised(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    axes = (0, 2, 3)
    mean, spread = pixels.mean(axes, keepdims=True), pixels.std(axes, keepdims=True)
    result: NDArray[np.float32] = ((pixels - mean) / np.maximum(spread, 1e-6)).astype(np.float32)
    return result


def _tokens(texts: list[Any], length: int) -> NDArray[np.int64]:
    """UTF-8 bytes as token ids, cut or padded with zeros."""
    out = np.zeros((len(texts), length), np.int64)
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise ConfigError(f"text in row {row}", text, "a string", "Remove rows without text")
        content = np.frombuffer(text.encode()[:length], np.uint8)
        out[row, : len(content)] = content
    return out
