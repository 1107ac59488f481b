"""The QoE of a streamed answer: how far its reader lags the ideal consumption line.

Andes (arXiv 2404.16283), definition of QoE. Times are seconds; with target TTFT D and reading time
per token tau, token k of the answer is ideally consumed at ``I_k = D + (k-1) tau`` and actually at
``c_k = max(d_k, c_{k-1} + tau)``, ``c_1 = max(d_1, D)``, where d_k is its delivery. Then

    QoE = 1 - S_delay / S_whole,   S_delay = sum_k (c_k - I_k),
    S_whole = n (c_n + tau - D) - n^2 tau / 2

We keep the *lag* ``c_k - I_k`` instead of c_k: it never falls with k, all tokens of a chunk share
it, and so a chunk of any size is one O(1) update without the drift of repeated additions. In terms
of the final lag, ``S_whole = n^2 tau / 2 + n lag``. Anchoring c_1 at D (the authors' code starts at
d_1) makes "earlier than expected" worth exactly the same as "on time".

The paper's principle "more tokens earlier never scores lower" holds for :meth:`QoETracker.live` at
a common horizon. The final score's normaliser ends with the stream, so a *last* token that comes
later can raise it by a little; that is a property of the published definition, kept as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from raysys.errors import ConfigError
from raysys.serving.andes.spec import QoESpec

__all__ = [
    "FinishReason",
    "Outcome",
    "QoESpec",
    "QoESummary",
    "QoETracker",
    "final_qoe",
    "qoe_of_deliveries",
    "summarize",
]

FloatArray = npt.NDArray[np.float64]
FinishReason = Literal["stop", "length", "cancelled", "error", "rejected", "timeout"]
FAILURES = ("error", "rejected", "timeout")
PERFECT = 0.99
GOOD = 0.95


@dataclass(frozen=True, slots=True)
class Outcome:
    """The final account of one request.

    Args:
        qoe: score in [0, 1]; 0 where ``counted`` is False.
        counted: False only for a client that left before it expected anything.
        truncated: the client or a failure cut the stream; ``qoe`` is over what was consumed.
        reason: why the request ended.
        tokens: visible tokens delivered.
        ttft_s: time to the first visible token, or None if there was none.
        finished_s: seconds from submission to the end.
        spec: what was expected.
        hidden_tokens: tokens that the reader never sees (reasoning, tool calls).
        hidden_s: seconds from submission to the last hidden token.
        clamped: deliveries that were reported out of order.
    """

    qoe: float
    counted: bool
    truncated: bool
    reason: FinishReason
    tokens: int
    ttft_s: float | None
    finished_s: float
    spec: QoESpec
    hidden_tokens: int = 0
    hidden_s: float = 0.0
    clamped: int = 0


class QoETracker:
    """QoE of one request in O(1) time and memory per delivery.

    Args:
        spec: the reader's targets.
        submitted_s: when the *user* submitted, on the clock of every other time given here.
    """

    __slots__ = (
        "clamped", "delay_sum_s", "first_s", "hidden_s", "hidden_tokens", "lag_s", "last_s",
        "outcome", "spec", "submitted_s", "tokens",
    )  # fmt: skip

    def __init__(self, spec: QoESpec, submitted_s: float = 0.0) -> None:
        self.spec = spec
        self.submitted_s = submitted_s
        self.tokens = 0
        self.lag_s = 0.0
        self.delay_sum_s = 0.0
        self.first_s: float | None = None
        self.last_s = 0.0
        self.hidden_tokens = 0
        self.hidden_s = 0.0
        self.clamped = 0
        self.outcome: Outcome | None = None

    def on_token(self, t: float, k: int = 1) -> None:
        """Record that ``k`` visible tokens were delivered together at time ``t``.

        Times that run backwards are clamped to the previous one and counted in ``clamped``;
        a chunk of no tokens and anything after :meth:`finish` change nothing.

        Raises:
            ConfigError: ``k`` is negative or ``t`` is not finite.
        """
        if k < 0:
            raise ConfigError("k", k, "a number of tokens >= 0")
        if not math.isfinite(t):
            raise ConfigError("t", t, "a finite time in seconds")
        if k == 0 or self.outcome is not None:
            return
        since = t - self.submitted_s
        if since < self.last_s:
            since = self.last_s
            self.clamped += 1
        self.last_s = since
        if self.first_s is None:
            self.first_s = since
        ideal = self.spec.ttft_s + self.tokens * self.spec.tau_s
        self.lag_s = max(self.lag_s, since - ideal)
        self.delay_sum_s += k * self.lag_s
        self.tokens += k

    def on_hidden(self, t: float, k: int = 1) -> None:
        """Record ``k`` tokens that the reader does not see; they count in no score."""
        self.hidden_tokens += k
        self.hidden_s = max(self.hidden_s, t - self.submitted_s)

    def finish(self, t: float, reason: FinishReason = "stop") -> Outcome:
        """Close the account at time ``t``; a second call returns the first answer.

        Rules (ours where the paper is silent): failed without a token scores 0; cancelled without
        a consumed token is left out before D and scores 0 after it; cancelled in mid-stream
        scores what was consumed; failed in mid-stream scores the live QoE, because the reader
        still expected more; an empty answer counts its end as one token.

        Raises:
            ConfigError: unknown reason.
        """
        if self.outcome is not None:
            return self.outcome
        if reason not in get_args(FinishReason):
            raise ConfigError("reason", reason, f"one of {', '.join(get_args(FinishReason))}")
        since = max(t - self.submitted_s, self.last_s)
        score, counted = self._final_score(since, reason)
        self.outcome = Outcome(
            qoe=score,
            counted=counted,
            truncated=reason not in ("stop", "length"),
            reason=reason,
            tokens=self.tokens,
            ttft_s=self.first_s,
            finished_s=since,
            spec=self.spec,
            hidden_tokens=self.hidden_tokens,
            hidden_s=self.hidden_s,
            clamped=self.clamped,
        )
        return self.outcome

    def qoe(self) -> float:
        """Score as if the answer ended with the last delivered token; 0 before the first."""
        if self.outcome is not None:
            return self.outcome.qoe
        return self._score(self.tokens, self.delay_sum_s)

    def soft_qoe(self, min_read_s: float) -> float:
        """Softer score for short answers: the normaliser uses at least ``min_read_s`` of text.

        A variant under its own name, never mixed into :meth:`qoe`; 0 seconds gives :meth:`qoe`.
        """
        if self.tokens == 0:
            return 0.0
        length = max(float(self.tokens), min_read_s * self.spec.tds)
        whole = length * length * self.spec.tau_s / 2.0 + length * self.lag_s
        return _clamp(1.0 - self.delay_sum_s / whole)

    def ttft_emphasis(self, alpha: float) -> float:
        """The optional factor ``alpha ** (TTFT - D)`` of v1; 1 for a first token on time.

        Only positive exponents count (early tokens never raise a score); alpha = 1 disables it.
        """
        if self.first_s is None:
            return 0.0 if alpha < 1.0 else 1.0
        return float(alpha ** max(0.0, self.first_s - self.spec.ttft_s))

    def live(self, h: float) -> float:
        """Score of the unfinished stream at horizon ``h``, not before the last delivery.

        Area consumed over the area below the ideal line, uncapped because the length is unknown;
        1 until D. With no further token it falls as ``h`` grows: waiting costs.
        """
        h -= self.submitted_s
        ideal = _progression(h - self.spec.ttft_s, self.spec.tau_s)
        if ideal <= 1e-9:  # nothing is expected yet, up to rounding
            return 1.0
        consumed = self._consumed(h)
        tau = self.spec.tau_s
        start = consumed * (h - self.spec.ttft_s) - tau * consumed * (consumed - 1) / 2.0
        delay = self.delay_sum_s - (self.tokens - consumed) * self.lag_s
        return _clamp(min(1.0, (start - delay) / ideal), tolerance=1e-6)

    def buffer_s(self, t: float) -> float:
        """Seconds of delivered text not yet read at ``t``; negative: the reader is waiting."""
        spec = self.spec
        return spec.ttft_s + self.tokens * spec.tau_s + self.lag_s - (t - self.submitted_s)

    def _consumed(self, since: float) -> int:
        """Tokens with c_k < since; unread ones are reading-limited, hence evenly spaced."""
        if self.tokens == 0:
            return 0
        last = self.spec.ttft_s + (self.tokens - 1) * self.spec.tau_s + self.lag_s
        return self.tokens - min(self.tokens, max(0, math.ceil((last - since) / self.spec.tau_s)))

    def _score(self, tokens: int, delay_sum_s: float) -> float:
        if tokens == 0:
            return 0.0
        whole = tokens * tokens * self.spec.tau_s / 2.0 + tokens * self.lag_s
        return _clamp(1.0 - delay_sum_s / whole)

    def _final_score(self, since: float, reason: FinishReason) -> tuple[float, bool]:
        if reason == "cancelled":
            consumed = self._consumed(since)
            unread = self.tokens - consumed
            score = self._score(consumed, self.delay_sum_s - unread * self.lag_s)
            return score, consumed > 0 or since >= self.spec.ttft_s
        if reason in FAILURES:
            return (self.live(self.submitted_s + since) if self.tokens else 0.0), True
        if self.tokens == 0:
            late = max(0.0, since - self.spec.ttft_s)
            return self.spec.tau_s / (self.spec.tau_s + 2.0 * late), True
        return self._score(self.tokens, self.delay_sum_s), True


def final_qoe(
    tokens: npt.ArrayLike, lag_s: npt.ArrayLike, delay_sum_s: npt.ArrayLike, tau_s: npt.ArrayLike
) -> FloatArray:
    """Final scores from tracker states, element by element; 0 where there are no tokens."""
    n, lag, delay = (np.asarray(x, dtype=np.float64) for x in (tokens, lag_s, delay_sum_s))
    whole = n * n * np.asarray(tau_s, dtype=np.float64) / 2.0 + n * lag
    safe = np.where(n > 0, whole, 1.0)
    score: FloatArray = np.where(n > 0, np.clip(1.0 - delay / safe, 0.0, 1.0), 0.0)
    return score


def qoe_of_deliveries(
    delivered_s: Sequence[npt.ArrayLike],
    specs: Sequence[QoESpec],
    submitted_s: npt.ArrayLike | None = None,
) -> FloatArray:
    """Final QoE of many complete streams at once.

    Args:
        delivered_s: per request the delivery times of its tokens, non-decreasing, seconds.
        specs: per request its targets; same length.
        submitted_s: shape (N,), when each was submitted; zeros if None.

    Returns:
        Shape (N,), float64; a request without tokens scores 0.

    Raises:
        ConfigError: lengths differ, or times run backwards or are not finite.
    """
    if len(delivered_s) != len(specs):
        raise ConfigError("specs", len(specs), f"one per request, {len(delivered_s)}")
    count = len(specs)
    start = np.zeros(count) if submitted_s is None else np.asarray(submitted_s, dtype=np.float64)
    if start.shape != (count,):
        raise ConfigError("submitted_s", start.shape, f"shape ({count},)")
    scores = np.zeros(count)
    for index, (times, spec) in enumerate(zip(delivered_s, specs)):
        times_K = np.asarray(times, dtype=np.float64) - start[index]
        if times_K.size == 0:
            continue
        if not np.isfinite(times_K).all() or (np.diff(times_K) < 0).any():
            raise ConfigError(f"delivered_s[{index}]", "...", "finite, non-decreasing times")
        ideal_K = spec.ttft_s + np.arange(times_K.size) * spec.tau_s
        lag_K = np.maximum.accumulate(np.maximum(times_K - ideal_K, 0.0))
        whole = times_K.size**2 * spec.tau_s / 2.0 + times_K.size * lag_K[-1]
        scores[index] = _clamp(1.0 - float(lag_K.sum()) / whole)
    return scores


@dataclass(frozen=True, slots=True)
class QoESummary:
    """Distribution of scores: percentiles are of the requests, shares in [0, 1]."""

    count: int
    mean: float
    minimum: float
    p1: float
    p5: float
    p10: float
    p50: float
    share_good: float
    share_perfect: float
    excluded: int
    truncated: int


def summarize(outcomes: Iterable[Outcome]) -> QoESummary:
    """Mean, tail and shares (>= 0.95 good, >= 0.99 perfect) over the counted requests."""
    all_outcomes = list(outcomes)
    scores = np.array([o.qoe for o in all_outcomes if o.counted], dtype=np.float64)
    excluded = len(all_outcomes) - scores.size
    truncated = sum(o.truncated for o in all_outcomes)
    if scores.size == 0:
        return QoESummary(0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, excluded, truncated)
    p1, p5, p10, p50 = (float(q) for q in np.percentile(scores, [1, 5, 10, 50]))
    return QoESummary(
        count=int(scores.size),
        mean=float(scores.mean()),
        minimum=float(scores.min()),
        p1=p1,
        p5=p5,
        p10=p10,
        p50=p50,
        share_good=float((scores >= GOOD).mean()),
        share_perfect=float((scores >= PERFECT).mean()),
        excluded=excluded,
        truncated=truncated,
    )


def _progression(span_s: float, tau_s: float) -> float:
    """Sum over k >= 0 of max(0, span - k tau): the area under a staircase of slope 1/tau."""
    steps = max(0, math.ceil(span_s / tau_s))
    return steps * span_s - tau_s * steps * (steps - 1) / 2.0


def _clamp(score: float, tolerance: float = 1e-9) -> float:
    """Clip rounding noise to [0, 1]; anything worse is a bug and must not pass silently."""
    if not -tolerance <= score <= 1.0 + tolerance:
        raise ArithmeticError(f"QoE {score} lies outside [0, 1]")
    return min(1.0, max(0.0, score))
