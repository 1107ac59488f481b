"""A coreset on disk and in a training loop: Parquet rows, a manifest, a data set and a sampler.

A folder holds ``coreset.parquet`` (id, score, hardness, stratum, hash and, if asked, weight) and
``manifest.json``; it appears whole or not at all, and loading it against other data is an error.
"""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raysys import machine
from raysys.errors import ConfigError, DataError, StorageError
from raysys.training.ccs.selection import Selection, SelectionConfig
from raysys.training.ccs.store import read_parquet, split, with_meta
from raysys.training.ccs.table import fingerprint

MANIFEST_VERSION = 1
ROWS, MANIFEST = "coreset.parquet", "manifest.json"


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Coreset:
    """A loaded coreset.

    Args:
        ids: int64, ascending.
        manifest: what was chosen, from what, and how; JSON-ready.
        weights: float64 per id, or None.
    """

    ids: NDArray[np.int64]
    manifest: Mapping[str, Any]
    weights: NDArray[np.float64] | None = None

    @classmethod
    def load(cls, folder: str) -> Coreset:
        """Load a coreset folder.

        Raises:
            StorageError: there is none.
            DataError: damaged, of another version, or rows and manifest disagree.
        """
        storage, _ = split(f"{folder}/{MANIFEST}")
        try:
            manifest = json.loads(storage.read(MANIFEST))
        except ValueError as error:
            raise DataError(f"{folder}/{MANIFEST}", f"damaged JSON ({error})", "") from None
        if manifest.get("version") != MANIFEST_VERSION:
            reason = f"version {manifest.get('version')}, this release reads {MANIFEST_VERSION}"
            raise DataError(f"{folder}/{MANIFEST}", reason, "Select again with this release")
        content, meta = read_parquet(f"{folder}/{ROWS}", "coreset")
        ids = content["id"].to_numpy()
        if meta["selection"] != manifest["selection"] or len(ids) != manifest["m"]:
            raise DataError(folder, "rows and manifest are of two selections", "Select again")
        weights = content["weight"].to_numpy() if "weight" in content.column_names else None
        return cls(ids, manifest, weights)

    def verify(self, ids: NDArray[np.int64], labels: NDArray[np.int64] | None) -> None:
        """Check that a data set is the one this coreset was selected from.

        Raises:
            DataError: other ids or labels (the data was changed, filtered or relabelled).
        """
        found = fingerprint(ids, labels)
        wanted = self.manifest["fingerprint"]
        if found != wanted:
            reason = f"the data has fingerprint {found}, the coreset was made from {wanted}"
            raise DataError("coreset", reason, "Use the same ids and labels, or select again")

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions in ``ids`` of the coreset's examples, in the order of ``ids``."""
        return np.flatnonzero(np.isin(ids, self.ids))


def save_coreset(
    folder: str,
    selection: Selection,
    config: SelectionConfig,
    *,
    weights: bool = False,
    extra: Mapping[str, Any] | None = None,
) -> Coreset:
    """Write a selection into a new folder, all at once.

    Args:
        weights: add stratum size over quota as a column.
        extra: further manifest entries (score file, AUC_pr, how beta was chosen).

    Raises:
        StorageError: the folder exists (another run wrote it), is read-only, or the disk is full.
    """
    parent, name = split(folder.rstrip("/"))
    temporary = f".part-{uuid.uuid4().hex}"
    manifest = {**make_manifest(selection, config), **(extra or {})}
    sample = selection.sample
    columns: dict[str, Any] = {
        "id": sample.ids,
        "score": sample.score,
        "hardness": sample.hardness,
        "stratum": sample.stratum.astype(np.int32),
        "hash": sample.hash,
    }
    if weights:
        columns["weight"] = selection.weights()
    meta = {"kind": "coreset", "selection": manifest["selection"]}
    try:
        with parent.writer(f"{temporary}/{ROWS}") as file:
            pq.write_table(with_meta(pa.table(columns), meta), file)
        text = json.dumps(manifest, indent=2, allow_nan=False)
        parent.write(f"{temporary}/{MANIFEST}", text.encode())
        if parent.exists(name):
            raise StorageError(folder, "already exists", "Give another folder, or remove it")
        parent.rename(temporary, name)
    except BaseException:  # an interrupt too leaves nothing behind
        parent.delete_folder(temporary)
        raise
    return Coreset(sample.ids, manifest, columns.get("weight"))


def make_manifest(selection: Selection, config: SelectionConfig) -> dict[str, Any]:
    """Describe a selection completely; JSON-ready."""
    return {
        "version": MANIFEST_VERSION,
        "selection": fingerprint(selection.ids, selection.sample.hash.view(np.int64)),
        "fingerprint": selection.fingerprint,
        "rows": selection.rows,
        "m": len(selection.ids),
        "beta": selection.beta,
        "config": dataclasses.asdict(config),
        "strata": {
            "sizes": selection.sizes.tolist(),
            "quotas": selection.quotas.tolist(),
            "edges": [part.edges.tolist() for part in selection.strata],
        },
        "classes": {
            "before": selection.classes_before.tolist(),
            "after": selection.classes_after.tolist(),
        },
        "warnings": list(selection.warnings),
        "packages": machine.package_versions(),
    }


class WithIndex:
    """Wraps a map-style data set so that items become ``(index, *item)``; the index is the id."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        item = self._dataset[index]
        return (index, *item) if isinstance(item, tuple) else (index, item)


class CoresetDataset:
    """View of a map-style data set that holds the coreset's examples only; nothing is copied.

    Args:
        ids: id of each position of ``dataset``; by default the positions themselves.
        labels: given, the data set is checked against the manifest's fingerprint.

    Raises:
        DataError: another data set than the manifest's.
        ConfigError: ``ids`` is not as long as the data set, or lacks ids of the coreset.
    """

    def __init__(
        self,
        dataset: Any,
        coreset: Coreset,
        *,
        ids: NDArray[np.int64] | None = None,
        labels: NDArray[np.int64] | None = None,
    ) -> None:
        known = np.arange(len(dataset), dtype=np.int64) if ids is None else ids
        if len(known) != len(dataset):
            raise ConfigError("ids", len(known), f"{len(dataset)} ids, one per example")
        if labels is not None:
            coreset.verify(known, labels)
        self._dataset = dataset
        self.rows = coreset.rows(known)
        if len(self.rows) != len(coreset.ids):
            raise ConfigError("ids", len(self.rows), f"all {len(coreset.ids)} ids of the coreset")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self._dataset[int(self.rows[index])]


class CoresetSampler:
    """Seed-exact order of a coreset's positions for one rank, resumable within an epoch.

    Every rank draws the same permutation of (seed, epoch) and takes each ``world``-th position;
    the tail is padded by wrapping around, so that ranks stay even (the recorder counts a padded
    example once).
    """

    def __init__(
        self, size: int, *, seed: int = 0, rank: int = 0, world: int = 1, shuffle: bool = True
    ) -> None:
        if size < 1:
            raise ConfigError("size", size, "at least one example")
        if not 0 <= rank < world:
            raise ConfigError("rank", rank, f"a rank in [0, {world})")
        self._size, self._seed, self._shuffle = size, seed, shuffle
        self._rank, self._world = rank, world
        self._epoch, self._start, self._given = 0, 0, 0

    def __len__(self) -> int:
        """Examples that this rank takes in a whole epoch."""
        return self._share(0)

    def _share(self, start: int) -> int:
        return (self._size - start + self._world - 1) // self._world

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch from its start."""
        self._epoch, self._start, self._given = epoch, 0, 0

    def __iter__(self) -> Iterator[int]:
        order: Sequence[int] = range(self._size)
        if self._shuffle:
            rng = np.random.default_rng([self._seed, self._epoch])
            order = rng.permutation(self._size).tolist()
        while self._given < self._share(self._start):
            place = (self._start + self._given * self._world + self._rank) % self._size
            self._given += 1
            yield order[place]
        self.set_epoch(self._epoch + 1)

    def state_dict(self) -> dict[str, int]:
        """Place in the epoch, counted over all ranks; each rank's is the same at a step's end."""
        consumed = self._start + self._given * self._world
        return {"epoch": self._epoch, "consumed": consumed, "seed": self._seed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Resume; another world size goes on after what all ranks together had consumed.

        Raises:
            ConfigError: the state was drawn with another seed.
        """
        if state["seed"] != self._seed:
            raise ConfigError("seed", state["seed"], f"the sampler's seed {self._seed}")
        self._epoch, self._given = int(state["epoch"]), 0
        self._start = min(int(state["consumed"]), self._size)
