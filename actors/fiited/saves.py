"""Checkpoints of a group of shards: one folder per step, complete or absent.

<root>/step-000000001234/shard-0000/...   one store checkpoint per shard
<root>/step-000000001234/group.json       exchange, chunks alive per shard; written last
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from raysys.errors import DataError, StorageError

GROUP = "group.json"


def partial_folder(root: Path, exchange: int) -> Path:
    """Where a save is being written."""
    return root / f".partial-{exchange:012d}"


def commit(root: Path, exchange: int, alive: list[int], keep: int = 2) -> Path:
    """Make a written save the latest one; older ones beyond ``keep`` are removed.

    Raises:
        StorageError: the folder cannot be written.
    """
    source, target = partial_folder(root, exchange), root / f"step-{exchange:012d}"
    try:
        text = json.dumps({"exchange": exchange, "alive": alive})
        (source / GROUP).write_text(text, encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        source.rename(target)
    except OSError as error:
        raise StorageError(str(target), error.strerror or str(error), "Check space") from error
    for old in complete(root)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def complete(root: Path) -> list[Path]:
    """Folders of complete saves, oldest first."""
    return sorted(p for p in root.glob("step-*") if (p / GROUP).is_file())


def read_group(folder: Path) -> dict[str, Any]:
    """What ``commit`` wrote.

    Raises:
        DataError: it is damaged.
    """
    try:
        found = json.loads((folder / GROUP).read_text(encoding="utf-8"))
        return {"exchange": int(found["exchange"]), "alive": [int(n) for n in found["alive"]]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(str(folder / GROUP), str(error), "Use an earlier save") from error


def shard_folders(folder: Path) -> list[Path]:
    """The shards' checkpoints of one save."""
    return sorted(folder.glob("shard-*"))


def latest_exchange(root: Path) -> int:
    """Exchange of the newest complete save, -1 without one."""
    found = complete(root)
    return int(read_group(found[-1])["exchange"]) if found else -1
