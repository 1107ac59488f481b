"""The event log: every reading, every decision and its reason, as JSON lines.

Also the log of a run in text: plasticity per module and when it froze (the paper's figure 11).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from raysys.errors import DataError, StorageError

_WIDTH = 60


class EventLog:
    """Appends events to a file (if any) and keeps them in memory; call it with an event."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Record one event."""
        row = dict(event)
        self.rows.append(row)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def resume(self, step: int) -> None:
        """Drop events after a checkpoint's step, so that a resumed log has no doubles."""
        source = read_events(self.path) if self.path and self.path.exists() else self.rows
        self.rows = [row for row in source if row.get("step", 0) < step]
        if self.path is not None:
            text = "".join(json.dumps(row) + "\n" for row in self.rows)
            self.path.write_text(text, encoding="utf-8")


def read_events(path: Path) -> list[dict[str, Any]]:
    """Read a log; a torn last line, as after a crash, is left out.

    Raises:
        StorageError: the file cannot be read.
        DataError: another line is not JSON.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise StorageError(str(path), error.strerror or str(error), "Check the path") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number == len(lines):
                break
            raise DataError(str(path), f"line {number} is not JSON", "Restore the log") from None
    return rows


def frozen_share(
    events: Sequence[Mapping[str, Any]], modules: int, total_steps: int
) -> list[float]:
    """For each module, the share of the run during which it was frozen."""
    spans = [(event["step"], event["upto"]) for event in events if event["event"] == "applied"]
    ends = [step for step, _ in spans[1:]] + [total_steps]
    frozen = [0.0] * modules
    for (start, upto), end in zip(spans, ends):
        for module in range(upto):
            frozen[module] += (end - start) / total_steps
    return frozen


def timeline(events: Sequence[Mapping[str, Any]], modules: int, total_steps: int) -> Iterator[str]:
    """One line of text per module: ``.`` training, ``#`` frozen."""
    applied = [(event["step"], event["upto"]) for event in events if event["event"] == "applied"]
    for module in range(modules):
        line = ""
        for column in range(_WIDTH):
            step = column * total_steps / _WIDTH
            upto = next((upto for at, upto in reversed(applied) if at <= step), 0)
            line += "#" if module < upto else "."
        yield f"module {module:2d}  {line}"
