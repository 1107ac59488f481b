"""A network that breaks: a TCP relay that delays, and cuts connections at random."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Iterator

CHUNK = 16_384


@contextlib.contextmanager
def lossy_relay(target: str, cut_after_s: float, delay_s: float, seed: int) -> Iterator[str]:
    """Relay to ``target``; yields the address to call instead.

    Args:
        cut_after_s: a connection lives for an exponential time with this mean.
        delay_s: longest extra delay of a chunk.
    """
    relay = _Relay(target, cut_after_s, delay_s, random.Random(seed))
    thread = threading.Thread(target=relay.run, daemon=True)
    thread.start()
    relay.ready.wait(10)
    try:
        yield f"127.0.0.1:{relay.port}"
    finally:
        relay.stop()
        thread.join(5)


class _Relay:
    def __init__(self, target: str, cut_after_s: float, delay_s: float, rng: random.Random) -> None:
        self.port = 0
        self.ready = threading.Event()
        self.cuts = 0
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._cut_after_s, self._delay_s, self._rng = cut_after_s, delay_s, rng
        self._loop = asyncio.new_event_loop()
        self._done = asyncio.Event()

    def run(self) -> None:
        """The relay's thread."""
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._done.set)

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self.ready.set()
        await self._done.wait()
        server.close()
        others = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
        except OSError:
            writer.close()
            return
        both = asyncio.gather(
            self._copy(reader, far_writer), self._copy(far_reader, writer), return_exceptions=True
        )
        try:
            await asyncio.wait_for(both, self._rng.expovariate(1 / self._cut_after_s))
        except TimeoutError:
            self.cuts += 1
        except asyncio.CancelledError:
            both.cancel()  # the relay closes; nobody waits for what is left
        finally:
            for end in (writer, far_writer):
                end.transport.abort()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(CHUNK):
            await asyncio.sleep(self._rng.uniform(0, self._delay_s))
            writer.write(chunk)
            await writer.drain()
        writer.close()
