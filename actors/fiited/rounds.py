"""Coordinator of adjustment rounds: merges what the shards send, phase by phase.

Decisions are remembered until a checkpoint makes them unneeded, across restarts of the coordinator
too: a shard that was restarted and replays its exchanges gets the answers that it got the first
time, and needs nobody else.
"""

from __future__ import annotations

import asyncio
from typing import Any

from actors.fiited.journal import Journal, Key
from raysys.errors import RemoteError
from raysys.training.fiited.sharding.rounds import Cut, find_bin, find_cut, share


class RoundCoordinator:
    """One per group of shards; its methods run on the actor's event loop.

    Args:
        journal: file that keeps decisions over restarts; "" keeps them in memory only.
    """

    def __init__(self, shards: int, churn: int, journal: str = "") -> None:
        self._shards, self._churn = shards, churn
        self._journal = Journal(journal)
        self._parts: dict[Key, dict[int, Any]] = {}
        self._ready: dict[Key, asyncio.Event] = {}
        kept = self._journal.read()
        self._decided: dict[Key, list[Any]] = {key: answers for key, (answers, _) in kept.items()}
        self._targets: dict[int, int] = {key[0]: target for key, (_, target) in kept.items()}
        self._journal.keep(self._decided, self._targets)  # nothing may follow a torn line

    async def merge(self, round_: int, phase: str, shard: int, part: Any) -> Any:
        """Hand in a shard's part of a phase; returns its answer once every shard's is there.

        Args:
            phase: "bin" (histogram and target -> :class:`Bin`), "cut" (members -> :class:`Cut`),
                "orders" (wishes -> :class:`Orders`).

        Raises:
            RemoteError: the round's earlier phases went with a coordinator that kept no journal.
        """
        key = (round_, phase)
        if key not in self._decided:
            event = self._ready.setdefault(key, asyncio.Event())
            self._parts.setdefault(key, {})[shard] = part
            if len(self._parts[key]) == self._shards:
                parts = self._parts.pop(key)
                answers = self._decide(key, [parts[i] for i in range(self._shards)])
                self._journal.append(key, answers, self._targets[round_])
                self._decided[key] = answers
                event.set()
            await event.wait()
        return self._decided[key][shard]

    def forget(self, round_: int) -> None:
        """A checkpoint holds everything up to this round."""
        for key in [key for key in self._decided if key[0] < round_]:
            del self._decided[key]
            self._ready.pop(key, None)
        self._targets = {r: t for r, t in self._targets.items() if r >= round_}
        self._journal.keep(self._decided, self._targets)

    def health(self) -> dict[str, int]:
        return {"remembered": len(self._decided), "waiting": len(self._parts)}

    def _decide(self, key: Key, parts: list[Any]) -> list[Any]:
        round_, phase = key
        if phase == "bin":
            self._targets[round_] = parts[0][1]
            return [find_bin([bins for bins, _ in parts], parts[0][1])] * self._shards
        if (round_, "bin") not in self._decided:
            reason = "its first phase was lost with the coordinator"
            raise RemoteError(f"round {round_}", reason, "Start the shards with a root for saves")
        if phase == "cut":
            found_bin = self._decided[round_, "bin"][0]
            cut = find_cut(parts, found_bin.keep) if found_bin.index >= 0 else Cut()
            return [cut] * self._shards
        return list(share(parts, self._targets[round_], self._churn))
