"""The token pacer: bursts and pauses go in, a steady stream no faster than reading comes out.

Andes (arXiv 2404.16283), the client-side token buffer. The paper anchors the first token at the
expected TTFT; our default ``"eager"`` shows it when it is there, because holding it back helps
nobody and leaves the QoE unchanged. ``"anchored"`` is for voice output and tests.

:class:`Pacer` is the state machine, without a clock. Its twin is
``actors/andes_web/pacer.js``; both pass ``tests/raysys/serving/andes_pacer_vectors.json``.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from raysys.errors import ConfigError
from raysys.serving.andes.qoe import QoETracker
from raysys.serving.andes.spec import QoESpec

TokenT = TypeVar("TokenT")

TOKENS_PER_WORD = 1.3
STALL_S = 1e-3
MAX_RECORD = 100_000


@dataclass(frozen=True, slots=True)
class PacerReport:
    """What the reader experienced.

    Args:
        delivered_s, shown_s: times of each token since submission (the first 100,000).
        depth: (time, unread tokens) after each arrival, bounded likewise.
        stalls: how often the display ran dry in mid-answer, ``stall_s`` for how long in all,
            ``longest_stall_s`` at worst.
        unshown: tokens dropped by a cancellation.
        qoe: score of the deliveries, as the server would compute it without the network.
    """

    delivered_s: tuple[float, ...]
    shown_s: tuple[float, ...]
    depth: tuple[tuple[float, int], ...]
    stalls: int
    stall_s: float
    longest_stall_s: float
    unshown: int
    qoe: float


class Pieces(list[str]):
    """Text that arrived at once, to be shown piece by piece.

    ``weight`` is how many tokens' time each piece takes to read.
    """

    weight = 1.0

    @classmethod
    def of_words(cls, words: Sequence[str]) -> Pieces:
        """Words instead of tokens."""
        pieces = cls(words)
        pieces.weight = TOKENS_PER_WORD
        return pieces


class Pacer(Generic[TokenT]):
    """Never reorders, loses, duplicates or merges tokens; two are never closer than tau.

    Args:
        spec: the reader's targets.
        submitted_s: when the request was sent, on the clock of all other times.
        mode: first token as it arrives (``"eager"``) or not before D (``"anchored"``).
        flush: at the end of the stream keep the pace, or show all that is left ``"now"``.
        max_buffer: unread tokens above which :attr:`full` asks the caller to stop reading.

    Raises:
        ConfigError: unknown mode or flush, or a buffer below 1.
    """

    def __init__(
        self,
        spec: QoESpec,
        submitted_s: float = 0.0,
        *,
        mode: Literal["eager", "anchored"] = "eager",
        flush: Literal["paced", "now"] = "paced",
        max_buffer: int = 100_000,
    ) -> None:
        if mode not in ("eager", "anchored"):
            raise ConfigError("mode", mode, "'eager' or 'anchored'")
        if flush not in ("paced", "now"):
            raise ConfigError("flush", flush, "'paced' or 'now'")
        if max_buffer < 1:
            raise ConfigError("max_buffer", max_buffer, "at least 1")
        self.spec = spec
        self.submitted_s = submitted_s
        self.shown = 0
        self._anchored = mode == "anchored"
        self._flush_now = flush == "now"
        self._max_buffer = max_buffer
        self._queue: deque[tuple[TokenT, float, float]] = deque()
        self._tracker = QoETracker(spec, submitted_s)
        self._ended = False
        self._free_s: float | None = None  # when the reader is done with the last shown token
        self._delivered: list[float] = []
        self._shown: list[float] = []
        self._depth: list[tuple[float, int]] = []
        self._stalls = 0
        self._stall_s = 0.0
        self._longest_s = 0.0
        self._unshown = 0

    @property
    def full(self) -> bool:
        """Whether the caller should stop reading the socket for now."""
        return len(self._queue) >= self._max_buffer

    @property
    def buffered(self) -> int:
        return len(self._queue)

    @property
    def done(self) -> bool:
        """The stream ended and everything was shown (or dropped)."""
        return self._ended and not self._queue

    def push(self, tokens: Iterable[TokenT], now_s: float, weight: float = 1.0) -> None:
        """Tokens arrived together; each takes ``weight * tau`` to read. After the end: ignored."""
        if self._ended:
            return
        for token in tokens:
            self._queue.append((token, now_s, weight))
            self._tracker.on_token(now_s)
            if len(self._delivered) < MAX_RECORD:
                self._delivered.append(now_s - self.submitted_s)
        if len(self._depth) < MAX_RECORD:
            self._depth.append((now_s - self.submitted_s, len(self._queue)))

    def due_s(self) -> float | None:
        """When the next token is to be shown; None while there is none."""
        if not self._queue:
            return None
        arrived = self._queue[0][1]
        if self._ended and self._flush_now:
            return arrived
        if self._free_s is not None:
            return max(arrived, self._free_s)
        return max(arrived, self.submitted_s + self.spec.ttft_s) if self._anchored else arrived

    def show(self, now_s: float) -> list[TokenT]:
        """Tokens to show at ``now_s``: none before the due time, one, or all on a flush."""
        due = self.due_s()
        if due is None or now_s < due:
            return []
        if self._ended and self._flush_now:
            tokens = [token for token, _, _ in self._queue]
            self._record(now_s, len(tokens))
            self._queue.clear()
            return tokens
        token, _, weight = self._queue.popleft()
        if self._free_s is not None:
            self._count_stall(due - self._free_s)
        # A timer that wakes a little late must not slow the stream down: keep the due time.
        at = due if now_s - due < self.spec.tau_s else now_s
        self._free_s = at + weight * self.spec.tau_s
        self._record(at, 1)
        return [token]

    def end(self, now_s: float) -> None:
        """The stream is complete; what is left is still shown."""
        self._ended = True

    def cancel(self, now_s: float) -> int:
        """The reader leaves: drop the buffer; returns how many tokens were shown."""
        self._ended = True
        self._unshown += len(self._queue)
        self._queue.clear()
        self._tracker.finish(now_s, "cancelled")
        return self.shown

    def report(self) -> PacerReport:
        """Figures so far; final once :attr:`done`."""
        return PacerReport(
            delivered_s=tuple(self._delivered),
            shown_s=tuple(self._shown),
            depth=tuple(self._depth),
            stalls=self._stalls,
            stall_s=self._stall_s,
            longest_stall_s=self._longest_s,
            unshown=self._unshown,
            qoe=self._tracker.qoe(),
        )

    def _record(self, at_s: float, count: int) -> None:
        self.shown += count
        room = MAX_RECORD - len(self._shown)
        self._shown.extend([at_s - self.submitted_s] * min(count, room))

    def _count_stall(self, seconds: float) -> None:
        if seconds > STALL_S:
            self._stalls += 1
            self._stall_s += seconds
            self._longest_s = max(self._longest_s, seconds)


def split_words(text: str) -> list[str]:
    """Pieces of about a word each whose concatenation is ``text``; 1.3 tokens apiece (v2)."""
    return re.findall(r"\s*\S+\s*|\s+", text)


def replay(
    pacer: Pacer[TokenT], arrivals: Sequence[tuple[float, Sequence[TokenT]]], end_s: float
) -> Iterator[tuple[float, TokenT]]:
    """Show a recorded stream with a perfect timer: yields (time, token). For studies and tests."""
    for at, tokens in [*arrivals, (end_s, ())]:
        yield from _show_until(pacer, at)
        pacer.push(tokens, at)
    pacer.end(end_s)
    yield from _show_until(pacer, float("inf"))


def _show_until(pacer: Pacer[TokenT], limit_s: float) -> Iterator[tuple[float, TokenT]]:
    while (due := pacer.due_s()) is not None and due < limit_s:
        for token in pacer.show(due):
            yield due, token
