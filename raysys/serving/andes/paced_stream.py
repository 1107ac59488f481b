"""Wrap a stream of chunks so that its tokens come out at reading pace.

The state machine is :class:`raysys.serving.andes.pacer.Pacer`; the clock is passed in. Memory stays
bounded: while the pacer is full nothing is read, so the socket pushes back on the server.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterable, Sequence
from typing import TypeVar

from raysys.serving.andes.pacer import Pacer, Pieces

TokenT = TypeVar("TokenT")
Clock = Callable[[], float]


async def paced(
    chunks: AsyncIterator[Sequence[TokenT]], pacer: Pacer[TokenT], clock: Clock
) -> AsyncGenerator[TokenT, None]:
    """Pace an asynchronous stream.

    Args:
        chunks: the raw stream; a chunk holds zero or more tokens (or :class:`Pieces` of text).
        pacer: fresh pacer whose ``submitted_s`` is on ``clock``.
        clock: monotonic seconds.

    A failing stream ends the pacing: what arrived is still shown, then the error rises. Closing
    this generator early drops the buffer (``pacer.report().unshown``) and closes ``chunks``.
    """
    pull: asyncio.Task[Sequence[TokenT]] | None = None
    failure: Exception | None = None
    ended = False
    try:
        while not (ended and pacer.done):
            if pull is None and not ended and not pacer.full:
                pull = asyncio.ensure_future(_next(chunks))
            due, now = pacer.due_s(), clock()
            if due is not None and now >= due:
                for token in pacer.show(now):
                    yield token
            elif pull is None:
                await asyncio.sleep((due or now) - now)
            else:
                await asyncio.wait({pull}, timeout=None if due is None else due - now)
            if pull is not None and pull.done():
                ended, failure = _take(pull, pacer, clock())
                pull = None
    finally:
        if pull is not None:
            pull.cancel()
            await asyncio.gather(pull, return_exceptions=True)
        if not pacer.done:
            pacer.cancel(clock())
        if isinstance(chunks, AsyncGenerator):
            await chunks.aclose()
    if failure is not None:
        raise failure


def paced_sync(
    chunks: Iterable[Sequence[TokenT]], pacer: Pacer[TokenT], clock: Clock
) -> Generator[TokenT, None, None]:
    """Pace a blocking stream: a thread reads it, this generator shows.

    Arguments and failures as in :func:`paced`. The thread ends with the stream, or at the next
    chunk after this generator was closed.
    """
    inbox: queue.Queue[Sequence[TokenT] | Exception | None] = queue.Queue(maxsize=64)
    closed = threading.Event()
    reader = threading.Thread(target=_read, args=(chunks, inbox, closed), daemon=True)
    reader.start()
    failure: Exception | None = None
    ended = False
    try:
        while not (ended and pacer.done):
            due, now = pacer.due_s(), clock()
            if due is not None and now >= due:
                yield from pacer.show(now)
            if ended:
                _pause(closed, pacer.due_s(), clock())
                continue
            chunk = _receive(inbox, closed, pacer, clock)
            if isinstance(chunk, tuple):
                continue
            if chunk is None or isinstance(chunk, Exception):
                ended, failure = True, chunk
                pacer.end(clock())
            else:
                _push(pacer, chunk, clock())
    finally:
        closed.set()
        if not pacer.done:
            pacer.cancel(clock())
    if failure is not None:
        raise failure


def _push(pacer: Pacer[TokenT], chunk: Sequence[TokenT], now_s: float) -> None:
    pacer.push(chunk, now_s, chunk.weight if isinstance(chunk, Pieces) else 1.0)


async def _next(chunks: AsyncIterator[Sequence[TokenT]]) -> Sequence[TokenT]:
    return await anext(chunks)


def _take(
    pull: asyncio.Task[Sequence[TokenT]], pacer: Pacer[TokenT], now_s: float
) -> tuple[bool, Exception | None]:
    """Move a finished read into the pacer; returns (stream ended, why if it failed)."""
    try:
        _push(pacer, pull.result(), now_s)
    except StopAsyncIteration:
        pacer.end(now_s)
        return True, None
    except Exception as error:
        pacer.end(now_s)
        return True, error
    return False, None


def _read(
    chunks: Iterable[Sequence[TokenT]],
    inbox: queue.Queue[Sequence[TokenT] | Exception | None],
    closed: threading.Event,
) -> None:
    last: Exception | None = None
    try:
        for chunk in chunks:
            # An empty tuple means something else to the one who receives.
            if not _put(inbox, list(chunk) if isinstance(chunk, tuple) else chunk, closed):
                return
    except Exception as error:
        last = error
    _put(inbox, last, closed)


def _put(
    inbox: queue.Queue[Sequence[TokenT] | Exception | None],
    item: Sequence[TokenT] | Exception | None,
    closed: threading.Event,
) -> bool:
    while not closed.is_set():
        try:
            inbox.put(item, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False


def _receive(
    inbox: queue.Queue[Sequence[TokenT] | Exception | None],
    closed: threading.Event,
    pacer: Pacer[TokenT],
    clock: Clock,
) -> list[TokenT] | Sequence[TokenT] | Exception | tuple[()] | None:
    """The next chunk, or the empty tuple when the display is due first."""
    due = pacer.due_s()
    if pacer.full:
        _pause(closed, due, clock())
        return ()
    try:
        return inbox.get(timeout=None if due is None else max(0.0, due - clock()))
    except queue.Empty:
        return ()


def _pause(closed: threading.Event, due_s: float | None, now_s: float) -> None:
    if due_s is not None and due_s > now_s:
        closed.wait(due_s - now_s)
