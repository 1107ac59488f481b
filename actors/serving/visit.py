"""One admitted request until its last byte: its QoE, its place at the door, its account."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from actors.serving.admission import AdmissionGate
from actors.serving.events import error_event, read_chunk
from actors.serving.ledger import QoELedger
from raysys.serving.andes.qoe import FinishReason, QoETracker


class Visit:
    """Follows a stream and accounts for it once, however it ends.

    Args:
        gate: where the request has a place.
        ledger: the books.
        tenant: who is charged.
        tracker: the reader's score.
        streamed: whether somebody reads as the text comes; other answers have no QoE.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        gate: AdmissionGate,
        ledger: QoELedger,
        tenant: str,
        tracker: QoETracker,
        *,
        streamed: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tracker = tracker
        self._gate = gate
        self._ledger = ledger
        self._tenant = tenant
        self._clock = clock
        self._open = True
        self._streamed = streamed
        if streamed:
            ledger.live.add(tracker)

    async def follow(self, chunks: Any) -> AsyncIterator[Any]:
        """Pass the chunks on; a failing stream ends with an error event instead of an exception."""
        reason: FinishReason = "cancelled"
        try:
            async for chunk in chunks:
                tokens, failed = read_chunk(chunk)
                self.tracker.on_token(self._clock(), tokens)
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
        self._ledger.live.discard(self.tracker)
        self._gate.leave(self._tenant, now)
        if self._streamed:
            self._ledger.finished(self._tenant, self.tracker.finish(now, reason), now)
