"""What an engine tells about itself: logs of steps and plans, totals by tenant. No vLLM here."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

ANONYMOUS = "anonymous"
OTHERS = "(others)"
MAX_TENANTS = 100  # names come from clients: without a bound they could fill memory and metrics
FLUSH_LINES = 32


class JsonLog:
    """Writes one JSON object a line: what happened, for later study.

    Args:
        path: file, appended to; None writes nothing.
    """

    def __init__(self, path: str | None) -> None:
        self._file: TextIO | None = None
        self._unflushed = 0
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = Path(path).open("a", encoding="utf-8")  # noqa: SIM115 - until close()

    def write(self, entry: Mapping[str, Any]) -> None:
        """Add a line."""
        if self._file is None:
            return
        self._file.write(json.dumps(entry) + "\n")
        self._unflushed += 1
        if self._unflushed >= FLUSH_LINES:
            self.flush()

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        if self._file is not None:
            self._file.flush()
            self._unflushed = 0

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self._file is not None:
            self._file.close()
            self._file = None


class StepLog(JsonLog):
    """Writes one JSON object a step, for ``raysys calibrate``."""

    def note(self, batch: int, prefill_tokens: int, context_tokens: int, seconds: float) -> None:
        """Note a step: sequences, prompt tokens computed, KV tokens held, wall-clock seconds."""
        self.write(
            {
                "batch": batch,
                "prefill_tokens": prefill_tokens,
                "context_tokens": context_tokens,
                "seconds": round(seconds, 6),
            }
        )


class TenantTotals:
    """Preemptions and planning time by tenant, since the engine started.

    A plan serves all live requests at once, so its time is shared out by their number.
    """

    def __init__(self) -> None:
        self.preemptions: Counter[str] = Counter()
        self.plan_s: dict[str, float] = {}
        self._names: set[str] = set()
        self._live: Counter[str] = Counter()

    def label(self, tenant: str | None) -> str:
        """The name under which a tenant is counted: itself, or one for all beyond the bound."""
        name = tenant or ANONYMOUS
        if name in self._names or len(self._names) < MAX_TENANTS:
            self._names.add(name)
            return name
        return OTHERS

    def entered(self, label: str) -> None:
        """A request came in."""
        self._live[label] += 1

    def left(self, label: str) -> None:
        """A request ended."""
        self._live[label] -= 1
        if self._live[label] <= 0:
            del self._live[label]

    def preempted(self, labels: Iterable[str]) -> None:
        """Requests lost their KV, by a plan or by an eviction."""
        self.preemptions.update(labels)

    def planned(self, seconds: float) -> None:
        """A plan took so long."""
        total = self._live.total()
        for label, live in self._live.items():
            self.plan_s[label] = self.plan_s.get(label, 0.0) + seconds * live / total

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """JSON-ready totals by tenant."""
        return {
            name: {
                "preemptions": self.preemptions[name],
                "plan_s": self.plan_s.get(name, 0.0),
                "live": self._live[name],
            }
            for name in sorted({*self.preemptions, *self.plan_s, *self._live})
        }
