"""What a training tells while it runs: rows in a file that its worker writes and its driver reads.

Ray Train hands figures to the driver only with the end of the run. Worker and driver share the
storage folder anyway, for the states.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import operator
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
LOG_FILE = "steps.jsonl"
POLL_S = 0.5


class RowLog:
    """Appends rows to a file, one JSON object a line.

    Args:
        path: the file; rows of steps that a resumed run takes again go.
        step: steps that are done already.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in rows_of(path) if steps_done(row) <= step]
        new = path.with_suffix(".new")
        new.write_text("".join(json.dumps(row) + "\n" for row in kept))
        new.replace(path)  # at once: a reader or a kill in between sees the old rows

    def __call__(self, row: Row) -> None:
        plain = {key: value for key, value in row.items() if isinstance(value, (int, float))}
        with self.path.open("a") as file:
            file.write(json.dumps(plain) + "\n")


def steps_done(row: Row) -> int:
    """Steps that are done after a row: training's are numbered from 0, evaluations count steps."""
    return int(row["step"]) if "perplexity" in row else int(row["step"]) + 1


def rows_of(path: Path) -> list[Row]:
    """The rows that are whole; a line that is still being written is left out."""
    if not path.exists():
        return []
    *lines, _ = path.read_text().split("\n")
    return [json.loads(line) for line in lines]


class _Reader:
    """Reads on where it stopped, and anew when a resumed run has put another file in its place."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: list[Row] = []
        self._file, self._offset = -1, 0

    def new_rows(self) -> list[Row]:
        """Rows that were not there at the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            number = os.fstat(file.fileno()).st_ino
            if number != self._file:
                return self._start_over(file.read(), number)
            file.seek(self._offset)
            return self._take(file.read())

    def _start_over(self, data: bytes, number: int) -> list[Row]:
        before, self._seen = self._seen, []
        self._file, self._offset = number, 0
        rows = self._take(data)
        same = sum(1 for _ in itertools.takewhile(operator.truth, map(operator.eq, rows, before)))
        return rows[same:]

    def _take(self, data: bytes) -> list[Row]:
        whole = data[: data.rfind(b"\n") + 1]
        rows = [json.loads(line) for line in whole.splitlines()]
        self._offset += len(whole)
        self._seen += rows
        return rows


@contextlib.contextmanager
def following(path: Path, on_row: Callable[[Row], None]) -> Iterator[None]:
    """Call a function with every row that is new while the block runs.

    After a restart of the worker, rows come again from the step of its last state.
    """
    stop = threading.Event()
    reader = _Reader(path)
    reader.new_rows()  # an earlier run's

    def look() -> None:
        for row in reader.new_rows():
            on_row(row)

    def loop() -> None:
        while not stop.wait(POLL_S):
            look()

    thread = threading.Thread(target=loop, name="lte-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        look()
