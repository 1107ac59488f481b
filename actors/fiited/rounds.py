"""Coordinator of adjustment rounds: merges what the shards send, phase by phase.

Decisions are remembered until a checkpoint makes them unneeded: a shard that was restarted and
replays its exchanges gets the answers that it got the first time, and needs nobody else.
"""

from __future__ import annotations

import asyncio
from typing import Any

from raysys.training.fiited.sharding.rounds import Bin, Cut, find_bin, find_cut, share

Key = tuple[int, str]


class RoundCoordinator:
    """One per group of shards; its methods run on the actor's event loop."""

    def __init__(self, shards: int, churn: int) -> None:
        self._shards, self._churn = shards, churn
        self._parts: dict[Key, dict[int, Any]] = {}
        self._decided: dict[Key, list[Any]] = {}
        self._ready: dict[Key, asyncio.Event] = {}
        self._targets: dict[int, int] = {}
        self._bins: dict[int, Bin] = {}

    async def merge(self, round_: int, phase: str, shard: int, part: Any) -> Any:
        """Hand in a shard's part of a phase; returns its answer once every shard's is there.

        Args:
            phase: "bin" (histogram and target -> :class:`Bin`), "cut" (members -> :class:`Cut`),
                "orders" (wishes -> :class:`Orders`).
        """
        key = (round_, phase)
        if key not in self._decided:
            event = self._ready.setdefault(key, asyncio.Event())
            self._parts.setdefault(key, {})[shard] = part
            if len(self._parts[key]) == self._shards:
                parts = self._parts.pop(key)
                self._decided[key] = self._decide(key, [parts[i] for i in range(self._shards)])
                event.set()
            await event.wait()
        return self._decided[key][shard]

    def forget(self, round_: int) -> None:
        """A checkpoint holds everything up to this round."""
        for key in [key for key in self._decided if key[0] < round_]:
            del self._decided[key]
            self._ready.pop(key, None)
        self._targets = {r: t for r, t in self._targets.items() if r >= round_}
        self._bins = {r: b for r, b in self._bins.items() if r >= round_}

    def health(self) -> dict[str, int]:
        return {"remembered": len(self._decided), "waiting": len(self._parts)}

    def _decide(self, key: Key, parts: list[Any]) -> list[Any]:
        round_, phase = key
        if phase == "bin":
            self._targets[round_] = parts[0][1]
            found = find_bin([bins for bins, _ in parts], parts[0][1])
            self._bins[round_] = found
            return [found] * self._shards
        if phase == "cut":
            found_bin = self._bins[round_]
            cut = find_cut(parts, found_bin.keep) if found_bin.index >= 0 else Cut()
            return [cut] * self._shards
        return list(share(parts, self._targets[round_], self._churn))
