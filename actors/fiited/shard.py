"""An embedding server: one shard's core behind an asynchronous actor.

The actor owns waiting (for the other workers' pushes), the rounds' conversation with the
coordinator, and background saves; everything else is :class:`ShardCore`.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from actors.fiited.saves import complete, read_group, shard_folders
from raysys.errors import RemoteError
from raysys.training.fiited.config import FiitedConfig, TableSpec
from raysys.training.fiited.sharding import Refusal, Reply, Request, ShardConfig, ShardCore

RETRY_S = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardOptions:
    """What a shard needs to start, and to start again after a failure.

    Args:
        owned: 4,096 bytes, 1 for its buckets.
        root: folder of the group's saves; "" for none.
        step_timeout_s: how long an exchange waits for the other workers.
    """

    config: FiitedConfig
    tables: tuple[TableSpec, ...]
    shard: ShardConfig
    owned: bytes
    root: str = ""
    step_timeout_s: float = 60.0


class EmbeddingShard:
    """See the module's text. Restores itself from the group's newest complete save."""

    def __init__(self, options: ShardOptions, coordinator: Any) -> None:
        self._options, self._coordinator = options, coordinator
        self._core = ShardCore(options.config, options.tables, options.shard, _mask(options.owned))
        self._lock = asyncio.Lock()
        self._turn = asyncio.Event()
        self._broken = ""
        saves = complete(Path(options.root)) if options.root else []
        if saves:
            self._restore(saves[-1])

    async def exchange(self, request: Request) -> Reply | Refusal:
        """One push and pull; waits until every worker's request of this exchange is there.

        Raises:
            RemoteError: another worker's request did not come in time, or a round was lost.
        """
        async with self._lock:
            if self._broken:
                raise RemoteError("embedding shard", self._broken, "Resume from the newest save")
            answer = self._core.stage(request)
            if answer is not None:
                return answer
            turn = self._turn
            if self._core.ready:
                await self._complete()
        try:
            await asyncio.wait_for(turn.wait(), self._options.step_timeout_s)
        except TimeoutError:
            name = f"the other workers of exchange {request.step}"
            raise RemoteError(name, "no request in time", "See the workers' logs") from None
        return self._core.replies[request.worker]

    async def save(self, folder: str, exchange: int) -> dict[str, Any]:
        """Copy the state after an exchange at once, then write it while training goes on.

        Raises:
            RemoteError: the shard is not at that exchange.
            StorageError: the folder cannot be written.
        """
        async with self._lock:
            if self._core.done != exchange:
                reason = f"it is at exchange {self._core.done}, not {exchange}"
                raise RemoteError("embedding shard", reason, "Save between exchanges")
            start = time.perf_counter()
            snapshot, alive = self._core.snapshot(), self._core.alive()
            round_ = self._round()
            pause_s = time.perf_counter() - start
        target = Path(folder) / f"shard-{self._options.shard.index:04d}"
        manifest = await asyncio.to_thread(snapshot.write, target)
        size = sum(part["bytes"] for part in manifest["parts"])
        return {"alive": alive, "pause_s": pause_s, "bytes": size, "round": round_}

    async def stats(self) -> dict[str, Any]:
        """Counters of the store and of the wire, and requests per bucket."""
        from raysys.training.fiited.metrics import sightings, statistics

        store = self._core.store
        return {
            **statistics(store), **sightings(store), **self._core.counters,
            "exchange": self._core.done, "loads": self._core.loads,
        }  # fmt: skip

    async def dims(self, table: str, ids: Any) -> Any:
        return self._core.store.dims(table, ids)

    async def rows(self) -> tuple[Any, Any, Any]:
        """Every resident row, for exports and tests (see ``NativeEngine.export``)."""
        entries, utils, values = self._core.store.engine.export()
        return entries, utils, values

    async def verify(self) -> None:
        """Check all invariants of the store."""
        self._core.store.verify()

    async def health(self) -> dict[str, int]:
        return {"exchange": self._core.done, "round": self._round()}

    async def close(self) -> None:
        """Give the store's memory back; may be called twice."""
        self._core.store.engine.close()

    async def _complete(self) -> None:
        if self._core.apply():
            try:
                await self._hold_round()
            except Exception as error:
                # The step counts as applied but its round has not run: nothing may build on it.
                self._broken = f"a round was lost ({error})"
                raise
        self._core.answer()
        done, self._turn = self._turn, asyncio.Event()
        done.set()

    async def _hold_round(self) -> None:
        core, round_ = self._core, self._round()
        where = await self._merge(round_, "bin", core.histogram())
        members = core.members(where) if where.index >= 0 else None
        cut = await self._merge(round_, "cut", members)
        core.carry_out(await self._merge(round_, "orders", core.wishes(cut)))

    async def _merge(self, round_: int, phase: str, part: Any) -> Any:
        """Ask the coordinator; a restarted one is asked again, by every shard.

        Raises:
            RemoteError: the other shards' parts did not come in time.
        """
        from ray.exceptions import RayActorError

        index, limit_s = self._options.shard.index, self._options.step_timeout_s
        deadline = time.monotonic() + limit_s
        while True:
            try:
                call = self._coordinator.merge.remote(round_, phase, index, part)
                return await asyncio.wait_for(_result(call), limit_s)
            except TimeoutError:
                name = f"phase {phase} of round {round_}"
                raise RemoteError(name, "a shard is missing", "See the shards' logs") from None
            except RayActorError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(RETRY_S)

    def _round(self) -> int:
        return int(self._core.store.engine.counters()["round"])

    def _restore(self, folder: Path) -> None:
        group = read_group(folder)
        self._core.restore(shard_folders(folder))
        self._core.set_elsewhere(sum(group["alive"]) - self._core.alive())


def _mask(owned: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(owned, np.uint8).copy()


async def _result(call: Any) -> Any:
    """An object reference as a coroutine, which is what a time limit needs."""
    return await call
