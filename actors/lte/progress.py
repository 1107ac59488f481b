"""What a training tells while it runs: rows in a file that its worker writes and its driver reads.

Ray Train hands figures to the driver only with the end of the run. Worker and driver share the
storage folder anyway, for the states.
"""

from __future__ import annotations

import contextlib
import json
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
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))

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


@contextlib.contextmanager
def following(path: Path, on_row: Callable[[Row], None]) -> Iterator[None]:
    """Call a function with every row that is new while the block runs.

    After a restart of the worker, rows come again from the step of its last state.
    """
    stop = threading.Event()
    seen = rows_of(path)

    def look() -> None:
        nonlocal seen
        rows = rows_of(path)
        same = 0
        while same < min(len(rows), len(seen)) and rows[same] == seen[same]:
            same += 1
        for row in rows[same:]:
            on_row(row)
        seen = rows

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
