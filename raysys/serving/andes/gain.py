"""QoE at a horizon, with and without service, for all requests and batch sizes at once.

Andes (arXiv 2404.16283), the scheduling problem: ``Qserve_i(B)`` and ``Qwait_i`` are the live QoE
at ``now + horizon`` if request i runs in a batch of B or gets nothing. The paper estimates them
from the delivery curve; here the consumption of the predicted tokens is summed in closed form.

Shapes: N requests, W batch sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raysys.serving.andes.snapshot import FloatArray, Snapshot


@dataclass(frozen=True, slots=True)
class Outlook:
    """The horizon's view of every request.

    Args:
        horizon_s: length of the look-ahead.
        consumed: (N,) area consumed by the horizon from tokens already delivered, token-seconds.
        ideal: (N,) area below the ideal line; 0 where nothing is expected by then.
        next_due_s: (N,) seconds since submission when the reader can take the next token.
    """

    horizon_s: float
    consumed: FloatArray
    ideal: FloatArray
    next_due_s: FloatArray

    @property
    def wait(self) -> FloatArray:
        """(N,) Qwait: live QoE at the horizon without service."""
        return np.minimum(1.0, ratio(self.consumed, self.ideal))


def ratio(area: FloatArray, ideal: FloatArray) -> FloatArray:
    """``area / ideal``, and 1 where nothing is expected; broadcasts."""
    safe = np.where(ideal > 1e-9, ideal, 1.0)
    result: FloatArray = np.where(ideal > 1e-9, area / safe, 1.0)
    return result


def buffer_s(snapshot: Snapshot) -> FloatArray:
    """(N,) seconds of unread text now; negative where the reader waits."""
    due = snapshot.ttft_s + snapshot.tokens * snapshot.tau_s + snapshot.lag_s
    result: FloatArray = due - snapshot.elapsed_s
    return result


def outlook(snapshot: Snapshot, horizon_s: float) -> Outlook:
    """Evaluate what is fixed at ``now + horizon_s``: O(N), no loop over tokens."""
    tau, n, lag = snapshot.tau_s, snapshot.tokens, snapshot.lag_s
    span = snapshot.elapsed_s + horizon_s - snapshot.ttft_s
    unread = np.clip(np.ceil((lag + (n - 1.0) * tau - span) / tau), 0.0, n)
    read = n - unread
    delay = snapshot.delay_sum_s - unread * lag
    consumed = read * span - tau * read * (read - 1.0) / 2.0 - delay
    steps = np.maximum(0.0, np.ceil(span / tau))
    ideal = steps * span - tau * steps * (steps - 1.0) / 2.0
    return Outlook(
        horizon_s=horizon_s,
        consumed=np.maximum(consumed, 0.0),
        ideal=ideal,
        next_due_s=snapshot.ttft_s + n * tau + lag,
    )


def served_area(
    snapshot: Snapshot,
    view: Outlook,
    latency_s: FloatArray,
    delay_s: FloatArray,
) -> FloatArray:
    """Area that service adds by the horizon.

    New tokens come at ``delay + L, delay + 2L, ...`` from now and are consumed from
    ``max(first, D, c_n + tau)`` with spacing ``max(tau, L)``: exact for L <= tau, slightly
    pessimistic for L > tau with unread text left.

    Args:
        latency_s: (W, 1) or scalar-like token latency L.
        delay_s: (N,) or (W, N) stall before the first step that serves the request.

    Returns:
        (W, N) area in token-seconds.
    """
    horizon = snapshot.elapsed_s + view.horizon_s
    first = snapshot.elapsed_s + latency_s + delay_s
    start = np.maximum(first, view.next_due_s)
    gap = np.maximum(snapshot.tau_s, latency_s)
    made = np.floor((horizon - first) / latency_s) + 1.0
    m = np.maximum(0.0, np.minimum(np.ceil((horizon - start) / gap), made))
    area: FloatArray = m * (horizon - start) - gap * m * (m - 1.0) / 2.0
    return area
