"""Pieces of a long measurement, kept on disk so that an interrupted claim goes on where it stopped.

``python -m jobs.bench SYSTEM --partial FOLDER`` names the folder. Each piece is one JSON file;
several processes may work on one folder, each takes pieces that no other has begun. The folder
holds what an earlier run measured: give an empty one to measure everything anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raysys.errors import DataError, RaysysError, StorageError
from raysys.runs.storage import Storage

_POLL_S = 2.0


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """One part of a measurement.

    Args:
        name: a readable file name.
        key: everything that the result depends on, JSON-ready; other keys are other pieces.
        measure: does the work and returns something JSON-ready.
    """

    name: str
    key: Mapping[str, Any]
    measure: Callable[[], Any]

    @property
    def file(self) -> str:
        """File name: the readable name and a digest of the key."""
        text = json.dumps(self.key, sort_keys=True)
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"


def measure_pieces(folder: str, pieces: Sequence[Piece]) -> list[Any]:
    """Results of all pieces, in order; those that the folder has are not measured again.

    Args:
        folder: created where it is missing; empty keeps nothing.

    Raises:
        StorageError: the folder cannot be written.
        DataError: a kept piece is not readable.
    """
    if not folder:
        return [piece.measure() for piece in pieces]
    root = Path(folder)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(folder, error.strerror or str(error), "Give another folder") from error
    found: dict[str, Any] = {}
    while len(found) < len({piece.file for piece in pieces}):
        before = len(found)
        for piece in pieces:
            if piece.file not in found:
                found |= _kept_or_measured(root, piece)
        if len(found) == before:
            time.sleep(_POLL_S)  # another process measures what is left
    return [found[piece.file] for piece in pieces]


def _kept_or_measured(root: Path, piece: Piece) -> dict[str, Any]:
    """``{file: result}``; empty where another live process is at this piece."""
    path = root / piece.file
    if path.exists():
        return {piece.file: _read(path)}
    claim = path.with_suffix(".busy")
    if not _claimed(claim):
        return {}
    try:
        if path.exists():  # finished by another process just now
            return {piece.file: _read(path)}
        started = time.time()
        result = piece.measure()
        content = {
            "key": dict(piece.key),
            "started": started,
            "seconds": time.time() - started,
            "load": os.getloadavg(),
            "result": result,
        }
        part = path.with_suffix(".part")
        part.write_text(json.dumps(content), encoding="utf-8")
        part.replace(path)
        return {piece.file: result}
    finally:
        claim.unlink(missing_ok=True)


def _claimed(claim: Path) -> bool:
    """Take a piece for this process; what a dead process had is free at the next try."""
    try:
        with claim.open("x", encoding="ascii") as file:
            file.write(str(os.getpid()))
        return True
    except FileExistsError:
        with contextlib.suppress(FileNotFoundError):
            pid = claim.read_text(encoding="ascii")
            if pid and not Path(f"/proc/{pid}").exists():
                claim.unlink()
        return False


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["result"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(str(path), f"not a kept piece ({error})", "Delete it") from error


def page_command(usage: str, page_of: Callable[[str], str], arguments: Sequence[str]) -> int:
    """Write the page of a folder of pieces, for ``python -m ... FOLDER PAGE.html``.

    Args:
        usage: printed unless there are two arguments.
        page_of: HTML of a folder; its errors are told without a traceback.

    Returns:
        The exit code.
    """
    if len(arguments) != 2:
        print(usage, file=sys.stderr)
        return 2
    try:
        target = Path(arguments[1]).absolute()
        Storage(str(target.parent)).write(target.name, page_of(arguments[0]).encode())
    except RaysysError as error:
        print(f"raysys: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0
