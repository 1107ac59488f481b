"""One admitted request until its last byte: its QoE, its place at the door, its account."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from actors.serving.admission import AdmissionGate
from actors.serving.events import error_event, read_chunk
from actors.serving.ledger import QoELedger
from raysys.serving.andes.qoe import FinishReason, QoETracker


class Visit:
    """Follows a stream and accounts for it once, however it ends.

    Args:
        gate: where each answer of the request has a place.
        ledger: the books.
        tenant: who is charged.
        trackers: the reader's score of each answer; the worst one counts for the request.
        streamed: whether somebody reads as the text comes; other answers have no QoE.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        gate: AdmissionGate,
        ledger: QoELedger,
        tenant: str,
        trackers: Sequence[QoETracker],
        *,
        streamed: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._trackers = trackers
        self._gate = gate
        self._ledger = ledger
        self._tenant = tenant
        self._clock = clock
        self._open = True
        self._streamed = streamed
        if streamed:
            ledger.live.update(trackers)

    async def follow(self, chunks: Any) -> AsyncIterator[Any]:
        """Pass the chunks on; a failing stream ends with an error event instead of an exception."""
        reason: FinishReason = "cancelled"
        try:
            async for chunk in chunks:
                tokens, failed = read_chunk(chunk)
                now = self._clock()
                for answer, count in tokens.items():
                    self._trackers[min(answer, len(self._trackers) - 1)].on_token(now, count)
                if failed:
                    reason = "error"
                yield chunk
            reason = "stop" if reason == "cancelled" else reason
        except Exception as error:  # the replica is gone: say so in the stream, then end it
            reason = "error"
            yield error_event(error)
        finally:
            self.end(reason)

    def end(self, reason: FinishReason) -> None:
        """Leave; a second call changes nothing."""
        if not self._open:
            return
        self._open = False
        now = self._clock()
        self._ledger.live.difference_update(self._trackers)
        self._gate.leave(self._tenant, now, len(self._trackers))
        if self._streamed:
            outcomes = [tracker.finish(now, reason) for tracker in self._trackers]
            worst = min(outcomes, key=lambda outcome: (not outcome.counted, outcome.qoe))
            self._ledger.finished(self._tenant, worst, now)
