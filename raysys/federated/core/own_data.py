"""Data that people bring: NumPy archives, Parquet tables, ``torch`` data sets, CIFAR's batches.

All become :class:`~raysys.federated.core.datasets.FederatedData`: arrays, and optionally the key of
the client that owns each sample. No pickle may name anything but arrays.
"""

from __future__ import annotations

import codecs
import dataclasses
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from raysys.errors import ConfigError, DataError
from raysys.federated.core.datasets import FederatedData, must_exist, split
from raysys.federated.core.natural_data import load_client_csv

HELD_OUT = 5  # one sample in five is the central test set


def load_npz_data(path: Path, seed: int = 0) -> FederatedData:
    """A NumPy archive with ``inputs``, ``targets`` and optionally ``client``, ``test_inputs``,
    ``test_targets``; without a test part a fifth is held out.

    Raises:
        CapabilityError: no such file. DataError: not an archive, or an array is missing.
    """
    must_exist(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError) as error:
        raise DataError(str(path), str(error), "Save it with numpy.savez(path, ...)") from error
    missing = {"inputs", "targets"} - set(arrays)
    if missing:
        raise DataError(str(path), f"has no array {sorted(missing)}", "Name them so")
    inputs, targets, keys = arrays["inputs"], arrays["targets"], arrays.get("client")
    if "test_inputs" not in arrays:
        return _hold_out(path.stem, inputs, targets, keys, seed)
    return FederatedData(
        name=path.stem,
        inputs=inputs,
        targets=targets,
        test_inputs=arrays["test_inputs"],
        test_targets=arrays["test_targets"],
        classes=_classes(targets),
        keys=keys,
    )


def load_parquet_data(
    path: Path, target: str = "target", client: str | None = "client", seed: int = 0
) -> FederatedData:
    """A Parquet file or a folder of them: a row per sample.

    Args:
        target: column of whole-number labels, or of floating-point values for regression.
        client: column of client keys for the natural partition; None or absent for none.

    All other columns must be numbers and are the inputs, in their order; a single column of
    fixed-size lists is taken as it is.

    Raises:
        CapabilityError: no such file. DataError: damaged, no target, missing values, or a column
            that is not numeric.
    """
    if not path.is_dir():
        must_exist(path)
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(str(path), str(error), "Write it with pyarrow or pandas") from error
    if target not in table.column_names:
        raise DataError(str(path), f"has no column {target!r}", f"It has {table.column_names}")
    names = [name for name in table.column_names if name not in (target, client)]
    inputs = [_numbers(table.column(name), f"{path}:{name}") for name in names]
    if not inputs:
        raise DataError(str(path), "has no input columns", "Add numeric columns")
    keys = None
    if client is not None and client in table.column_names:
        keys = np.asarray(table.column(client).to_pylist())
    joined = inputs[0] if inputs[0].ndim > 1 and len(inputs) == 1 else np.column_stack(inputs)
    targets = _numbers(table.column(target), f"{path}:{target}")
    return _hold_out(path.stem, joined, targets, keys, seed)


class _ArraysOnly(pickle.Unpickler):
    """Reads the pickles of CIFAR's authors: numbers and arrays, and nothing that could run."""

    ALLOWED: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): codecs.encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Only what arrays are made of."""
        try:
            return self.ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a data set") from None


def load_cifar_data(folder: Path, seed: int = 0) -> FederatedData:
    """CIFAR-10 or CIFAR-100 from its "python version": float32 [N, 3, 32, 32] in [0, 1].

    The files are pickles; they are read by an unpickler that knows numbers and arrays only.

    Raises:
        CapabilityError: no such folder. DataError: damaged, or holding anything else.
    """
    del seed  # the data set has its own split
    ten = sorted(folder.glob("data_batch_*"))
    train = [_cifar_batch(path) for path in ten or [folder / "train"]]
    test_inputs, test_targets = _cifar_batch(folder / ("test_batch" if ten else "test"))
    targets = np.concatenate([labels for _, labels in train])
    return FederatedData(
        name=folder.name,
        inputs=np.concatenate([pixels for pixels, _ in train]),
        targets=targets,
        test_inputs=test_inputs,
        test_targets=test_targets,
        classes=int(max(targets.max(), test_targets.max())) + 1,
    )


def with_clients(data: FederatedData, table: Path) -> FederatedData:
    """The data with clients from a table of client and index (row of the training samples)."""
    return dataclasses.replace(data, keys=load_client_csv(table, len(data.targets)))


def from_torch(
    dataset: torch.utils.data.Dataset[Any],
    keys: Sequence[Any] | None = None,
    name: str = "torch",
    seed: int = 0,
) -> FederatedData:
    """A map-style ``torch`` data set of (input, target) pairs; a fifth is held out.

    Args:
        keys: client key of each sample, for the natural partition.

    Raises:
        ConfigError: the data set has no length, is empty, or its samples differ in shape.
    """
    if not hasattr(dataset, "__len__") or not len(dataset):
        raise ConfigError("dataset", type(dataset).__name__, "a map-style data set with samples")
    pairs = [dataset[index] for index in range(len(dataset))]
    try:
        inputs = np.stack([np.asarray(x) for x, _ in pairs])
        targets = np.stack([np.asarray(y) for _, y in pairs])
    except (TypeError, ValueError) as error:
        raise ConfigError("dataset", str(error), "(input, target) pairs of one shape") from None
    own = None if keys is None else np.asarray(keys)
    return _hold_out(name, inputs, targets, own, seed)


def _cifar_batch(path: Path) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    must_exist(path)
    try:
        with path.open("rb") as file:
            batch = _ArraysOnly(file, encoding="bytes").load()
        pixels = np.asarray(batch[b"data"], dtype=np.float32).reshape(-1, 3, 32, 32) / 255.0
        names = (b"labels", b"fine_labels")
        labels = next(batch[name] for name in names if name in batch)
    except (pickle.UnpicklingError, EOFError, KeyError, ValueError, TypeError, StopIteration,
            AttributeError, ImportError, IndexError) as error:  # fmt: skip
        raise DataError(str(path), f"is no CIFAR batch ({error})", "Fetch it again") from error
    return pixels.astype(np.float32), np.asarray(labels, dtype=np.int64)


def _hold_out(
    name: str,
    inputs: npt.NDArray[Any],
    targets: npt.NDArray[Any],
    keys: npt.NDArray[Any] | None,
    seed: int,
) -> FederatedData:
    held_out = max(1, len(targets) // HELD_OUT)
    return split(name, inputs, targets, _classes(targets), held_out, seed, keys)


def _classes(targets: npt.NDArray[Any]) -> int:
    """Number of classes of whole-number labels; 0, for regression, of anything else."""
    return int(targets.max()) + 1 if np.issubdtype(targets.dtype, np.integer) else 0


def _numbers(column: pa.ChunkedArray, place: str) -> npt.NDArray[Any]:
    """A column as an array [N] or, of lists, [N, width]."""
    if column.null_count:
        raise DataError(place, f"has {column.null_count} missing values", "Fill or drop them")
    array = column.combine_chunks()
    if pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type):
        flat = array.flatten()
        if len(array) == 0 or len(flat) % len(array):
            raise DataError(place, "has lists of different lengths", "Pad them")
        return np.asarray(flat.to_numpy(zero_copy_only=False)).reshape(len(array), -1)
    values = np.asarray(array.to_numpy(zero_copy_only=False))
    if not np.issubdtype(values.dtype, np.number):
        raise DataError(place, f"is of type {array.type}", "Only numbers can be trained on")
    return values
