"""The coordinator's decisions as lines of JSON, so that a restarted coordinator still knows them.

Without them a shard that is restarted after its coordinator was, and replays a round that the
others have behind them, would wait for parts that nobody sends again.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

from raysys.training.fiited.sharding.rounds import Bin, Cut, Orders

PATTERN = "rounds-*.jsonl"
Key = tuple[int, str]
_KINDS: dict[str, type[Bin] | type[Cut] | type[Orders]] = {
    "bin": Bin, "cut": Cut, "orders": Orders,
}  # fmt: skip


def new_journal(root: str) -> str:
    """Path of an empty journal for a new group; journals of earlier groups are removed.

    Returns:
        "" without a root: decisions then live in the coordinator's memory only.
    """
    if not root:
        return ""
    folder = Path(root)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(PATTERN):
        old.unlink(missing_ok=True)
    return str(folder / f"rounds-{uuid.uuid4().hex}.jsonl")


class Journal:
    """Appends decisions and reads them back.

    Args:
        path: file of one group; "" writes nothing.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path) if path else None

    def read(self) -> dict[Key, tuple[list[Any], int]]:
        """Answers per shard and the round's target, by (round, phase); a torn last line is left."""
        if self._path is None or not self._path.exists():
            return {}
        found = {}
        for line in self._path.read_text().splitlines():
            try:
                one = json.loads(line)
            except json.JSONDecodeError:
                break  # killed while writing: no shard was answered from it
            kind = _KINDS[one["phase"]]
            answers = [kind(**fields) for fields in one["answers"]]
            found[one["round"], one["phase"]] = (answers, one["target"])
        return found

    def append(self, key: Key, answers: list[Any], target: int) -> None:
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(_line(key, answers, target))

    def keep(self, decided: dict[Key, list[Any]], targets: dict[int, int]) -> None:
        """Replace the file by these decisions, at once."""
        if self._path is None:
            return
        fresh = self._path.with_suffix(".tmp")
        fresh.write_text("".join(_line(key, a, targets[key[0]]) for key, a in decided.items()))
        fresh.replace(self._path)


def _line(key: Key, answers: list[Any], target: int) -> str:
    round_, phase = key
    record = {
        "round": round_,
        "phase": phase,
        "target": target,
        "answers": [{name: _plain(x) for name, x in asdict(a).items()} for a in answers],
    }
    return json.dumps(record) + "\n"


def _plain(value: Any) -> Any:
    """NumPy scalars as Python's; floats keep every bit in JSON's shortest form."""
    return value.item() if hasattr(value, "item") else value
