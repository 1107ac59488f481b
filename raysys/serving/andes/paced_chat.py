"""Paces what the official OpenAI client streams, blocking or asynchronous.

    sent = time.monotonic()
    stream = client.chat.completions.create(..., stream=True)
    answer = PacedChat(stream, QoESpec(tds=4.8), time.monotonic, submitted_s=sent)
    for piece in answer:
        print(piece, end="", flush=True)
    answer.report().qoe

It knows the client's chunks by their shape and imports nothing of it. Leaving early (``close``, or
the end of the ``with`` block) closes the stream, which tells the server to stop.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from types import TracebackType
from typing import Any

from raysys.serving.andes.paced_stream import paced, paced_sync
from raysys.serving.andes.pacer import Pacer, PacerReport, Pieces, split_words
from raysys.serving.andes.spec import QoESpec

Clock = Callable[[], float]


def pieces_of(chunk: Any) -> Pieces:
    """The visible text of a chat or completion chunk, in pieces to be shown one by one.

    One token a chunk stays whole. An endpoint that joins tokens gives several words at once: they
    are shown word by word, 1.3 tokens each. Reasoning and tool calls are not visible.
    """
    texts = [_text(choice) for choice in chunk.choices if choice.index == 0]
    text = "".join(filter(None, texts))
    words = split_words(text)
    return Pieces([text] if text else []) if len(words) < 2 else Pieces.of_words(words)


def _pacer(
    spec: QoESpec, clock: Clock, submitted_s: float | None, options: dict[str, Any]
) -> Pacer[str]:
    """The pacer of a stream that was asked for at ``submitted_s``, or now."""
    return Pacer(spec, clock() if submitted_s is None else submitted_s, **options)


class PacedChat:
    """Text of a blocking stream at reading pace; an iterator and a context manager.

    Args:
        stream: what ``create(..., stream=True)`` of the client returned.
        spec: the reader's targets.
        clock: monotonic seconds.
        submitted_s: when the request was sent, on ``clock``; now, if it is not told.
        pacer: options of :class:`Pacer` (``mode``, ``flush``, ``max_buffer``).

    An error of the stream rises after what had arrived was shown.
    """

    def __init__(
        self,
        stream: Iterable[Any],
        spec: QoESpec,
        clock: Clock,
        *,
        submitted_s: float | None = None,
        **pacer: Any,
    ) -> None:
        self._stream = stream
        self._pacer = _pacer(spec, clock, submitted_s, pacer)
        self._shown = paced_sync(map(pieces_of, stream), self._pacer, clock)

    def __iter__(self) -> Iterator[str]:
        return self._shown

    def __enter__(self) -> PacedChat:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop what is not shown and leave; may be called twice."""
        self._shown.close()
        close = getattr(self._stream, "close", None)
        if close is not None:
            close()

    def report(self) -> PacerReport:
        """What the reader experienced so far."""
        return self._pacer.report()


class AsyncPacedChat:
    """The same for the asynchronous client; an asynchronous iterator and context manager."""

    def __init__(
        self,
        stream: AsyncIterator[Any],
        spec: QoESpec,
        clock: Clock,
        *,
        submitted_s: float | None = None,
        **pacer: Any,
    ) -> None:
        self._stream = stream
        self._pacer = _pacer(spec, clock, submitted_s, pacer)
        self._shown = paced(_pieces(stream), self._pacer, clock)

    def __aiter__(self) -> AsyncIterator[str]:
        return self._shown

    async def __aenter__(self) -> AsyncPacedChat:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Drop what is not shown and leave; may be called twice."""
        await self._shown.aclose()
        close = getattr(self._stream, "close", None)
        if close is not None:
            await close()

    def report(self) -> PacerReport:
        """What the reader experienced so far."""
        return self._pacer.report()


async def _pieces(stream: AsyncIterator[Any]) -> AsyncGenerator[Pieces, None]:
    async for chunk in stream:
        yield pieces_of(chunk)


def _text(choice: Any) -> str | None:
    delta = getattr(choice, "delta", None)
    text: str | None = choice.text if delta is None else delta.content
    return text
