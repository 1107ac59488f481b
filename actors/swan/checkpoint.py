"""Checkpoints that survive a kill at any instruction.

Two generations; each is written under another name, synced, and renamed. A header carries a
checksum, so that a torn or damaged file is told from a whole one and the older generation is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raysys.errors import DataError, StorageError

MAGIC = "raysys-swan"
VERSION = 1
GENERATIONS = 2


def random_state() -> dict[str, Any]:
    """State of the generators of Python, numpy and torch, in types that load safely."""
    version, internal, gauss = random.getstate()
    name, keys, place, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            place,
            has_gauss,
            cached,
        ],
        "torch": torch.get_rng_state(),
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Put the generators back."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, place, has_gauss, cached = state["numpy"]
    legacy = (name, keys.numpy().astype(np.uint32), int(place), int(has_gauss), float(cached))
    np.random.set_state(legacy)
    torch.set_rng_state(state["torch"])


def snapshot() -> Callable[[], None]:
    """Note the generators' states for this process alone, cheaply; the result puts them back."""
    python, legacy, state = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def put_back() -> None:
        random.setstate(python)
        np.random.set_state(legacy)
        torch.set_rng_state(state)

    return put_back


class CheckpointFolder:
    """Generations of one task's state in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.skipped: list[str] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(str(folder), error.strerror or str(error), "Choose another") from (
                error
            )

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write a generation; older ones beyond two are removed afterwards.

        Raises:
            StorageError: the disk is full or refuses; earlier generations stay as they were.
        """
        body = io.BytesIO()
        torch.save(dict(state), body)
        content = body.getbuffer()
        digest = hashlib.sha256(content).hexdigest()
        header = {"magic": MAGIC, "version": VERSION, "step": step, "sha256": digest}
        target = self.folder / f"step-{step:012d}.swan"
        partial = self.folder / f".part-{os.getpid()}"
        try:
            with partial.open("wb") as file:
                file.write(json.dumps(header).encode() + b"\n")
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
            self._sync()
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            reason = error.strerror or str(error)
            raise StorageError(str(target), reason, "Free space; the last one stays valid") from (
                error
            )
        self._clean(target)
        return target

    def load(self) -> tuple[int, dict[str, Any]] | None:
        """Newest whole generation as (step, state), or None when there is none at all.

        Raises:
            DataError: there are generations, and every one is damaged or of a later version.
        """
        self.skipped = []
        found = False
        for path in sorted(self.folder.glob("step-*.swan"), reverse=True):
            found = True
            try:
                return self._read(path)
            except DataError as error:
                self.skipped.append(str(error))
        if found:
            reason = "; ".join(self.skipped)
            raise DataError(str(self.folder), reason, "Remove the folder to start anew")
        return None

    def _read(self, path: Path) -> tuple[int, dict[str, Any]]:
        try:
            head, _, content = path.read_bytes().partition(b"\n")
            header = json.loads(head)
        except (OSError, ValueError) as error:
            raise DataError(str(path), f"unreadable ({error})", "") from error
        if not isinstance(header, dict) or header.get("magic") != MAGIC:
            raise DataError(str(path), "not a checkpoint of this engine", "")
        if int(header["version"]) > VERSION:
            raise DataError(str(path), f"of version {header['version']}", "Update raysys")
        if hashlib.sha256(content).hexdigest() != header["sha256"]:
            raise DataError(str(path), "checksum does not match: torn or damaged", "")
        # weights_only: a checkpoint holds tensors and plain values, never code.
        state = torch.load(io.BytesIO(content), weights_only=True)
        return int(header["step"]), dict(state)

    def _clean(self, newest: Path) -> None:
        for path in sorted(self.folder.glob("step-*.swan"), reverse=True)[GENERATIONS:]:
            if path != newest:
                path.unlink(missing_ok=True)
        for path in self.folder.glob(".part-*"):
            owner = path.name.removeprefix(".part-")
            if owner.isdigit() and not Path(f"/proc/{owner}").exists():
                path.unlink(missing_ok=True)

    def _sync(self) -> None:
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class ResumableSampler:
    """Shuffled sample numbers, epoch after epoch, that resume at the exact next sample.

    Hand it to a ``DataLoader`` as ``sampler`` and call :meth:`taken` after every step, or draw
    batches from :meth:`batches`, which counts by itself.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size, self.seed = size, seed
        self.epoch, self.position = 0, 0

    def order(self) -> npt.NDArray[np.int64]:
        """The permutation of the current epoch."""
        return np.random.default_rng((self.seed, self.epoch)).permutation(self.size)

    def __len__(self) -> int:
        return self.size - self.position

    def __iter__(self) -> Iterator[int]:
        yield from self.order()[self.position :].tolist()

    def taken(self, samples: int) -> None:
        """So many samples have been trained on."""
        self.position += samples
        if self.position >= self.size:
            self.epoch, self.position = self.epoch + 1, 0

    def batches(self, batch_size: int) -> Iterator[npt.NDArray[np.int64]]:
        """Endless batches; the last of an epoch may be short."""
        while True:
            batch = self.order()[self.position : self.position + batch_size]
            self.taken(len(batch))
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Where we are."""
        return {"size": self.size, "seed": self.seed, "epoch": self.epoch, "at": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on there.

        Raises:
            DataError: the state is of a data set of another size.
        """
        if state["size"] != self.size:
            reason = f"of {state['size']} samples, not {self.size}"
            raise DataError("sampler", reason, "Give the data set of the checkpoint")
        self.seed, self.epoch, self.position = state["seed"], state["epoch"], state["at"]
