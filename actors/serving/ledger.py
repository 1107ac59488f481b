"""What readers got, by tenant: Ray metrics for Prometheus and the dashboard, and a series.

Losing the ledger (its process restarts) loses counts, never requests.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from raysys.serving.andes.qoe import GOOD, PERFECT, Outcome, QoETracker

MAX_TENANTS = 100  # names come from clients: without a bound they could fill memory and metrics
OTHERS = "(others)"
RECENT_S = 30.0
SERIES_POINTS = 600

QOE_BOUNDS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99]
TTFT_BOUNDS = [0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0]


class QoELedger:
    """Counts finished and refused requests; ``metrics=False`` keeps Ray out (tests).

    ``live`` holds the trackers of the streams under way.
    """

    def __init__(self, *, metrics: bool = True) -> None:
        self.totals: dict[str, dict[str, float]] = {}
        self.live: set[QoETracker] = set()
        self.series: deque[dict[str, float]] = deque(maxlen=SERIES_POINTS)
        self._recent: deque[tuple[float, float]] = deque(maxlen=10_000)
        self._metrics = _make_metrics() if metrics else {}

    def finished(self, tenant: str, outcome: Outcome, now_s: float) -> None:
        """A stream ended at ``now_s`` (monotonic seconds)."""
        tenant = self._label(tenant)
        total = self._total(tenant)
        if not outcome.counted:
            total["left_early"] += 1
            return
        self._recent.append((now_s, outcome.qoe))
        total["requests"] += 1
        total["qoe_sum"] += outcome.qoe
        total["perfect"] += outcome.qoe >= PERFECT
        if self._metrics:
            tags = {"tenant": tenant, "kind": outcome.spec.kind}
            self._metrics["qoe"].observe(max(outcome.qoe, 1e-9), tags)
            if outcome.ttft_s is not None:
                self._metrics["ttft"].observe(max(outcome.ttft_s, 1e-9), tags)
            if outcome.qoe >= PERFECT:
                self._metrics["perfect"].inc(1.0, tags)

    def refused(self, tenant: str, now_s: float) -> None:
        """A request was answered 429: its reader got nothing, which is a QoE of 0."""
        tenant = self._label(tenant)
        self._recent.append((now_s, 0.0))
        total = self._total(tenant)
        total["requests"] += 1
        total["refused"] += 1
        if self._metrics:
            self._metrics["refused"].inc(1.0, {"tenant": tenant})

    def sample(self, now_s: float) -> dict[str, float]:
        """Add a point to the series: the QoE of those who read now or ended in the last 30 s.

        Returns:
            ``t`` (monotonic seconds), ``live`` streams, ``qoe`` (1 where nobody reads), and
            ``behind``: the share of live readers below 0.95.
        """
        while self._recent and self._recent[0][0] < now_s - RECENT_S:
            self._recent.popleft()
        reading = [tracker.live(max(now_s, tracker.submitted_s)) for tracker in self.live]
        scores = reading + [qoe for _, qoe in self._recent]
        point = {
            "t": now_s,
            "live": float(len(reading)),
            "qoe": sum(scores) / len(scores) if scores else 1.0,
            "behind": sum(qoe < GOOD for qoe in reading) / len(reading) if reading else 0.0,
        }
        self.series.append(point)
        return point

    def mean_qoe(self, tenant: str) -> float:
        """Mean QoE of a tenant, refused requests counted as 0; 1 without any."""
        total = self._total(tenant)
        return total["qoe_sum"] / total["requests"] if total["requests"] else 1.0

    def _label(self, tenant: str) -> str:
        return tenant if tenant in self.totals or len(self.totals) < MAX_TENANTS else OTHERS

    def _total(self, tenant: str) -> dict[str, float]:
        empty = ("requests", "qoe_sum", "perfect", "refused", "left_early")
        return self.totals.setdefault(tenant, dict.fromkeys(empty, 0.0))


def _make_metrics() -> dict[str, Any]:
    from ray.util.metrics import Counter, Histogram

    keys = ("tenant", "kind")
    return {
        "qoe": Histogram(
            "raysys_qoe", "QoE of finished streams", boundaries=QOE_BOUNDS, tag_keys=keys
        ),
        "ttft": Histogram(
            "raysys_ttft_s", "Seconds to first token", boundaries=TTFT_BOUNDS, tag_keys=keys
        ),
        "perfect": Counter("raysys_qoe_perfect", "Streams with a QoE of 0.99 or more", keys),
        "refused": Counter("raysys_refused", "Requests answered 429", ("tenant",)),
    }
