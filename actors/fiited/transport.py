"""Requests to shard actors, repeated until answered: exchanges are safe to repeat."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from raysys.errors import RemoteError
from raysys.training.fiited.sharding import Refusal, Reply, Request
from raysys.training.fiited.sharding.embedding import Recover

RETRY_S = 0.2


class RayTransport:
    """Sends one request to each shard at once.

    Args:
        shards: actor handles in order of shard.
        timeout_s: how long a shard may be away (restarting) before the step fails.
    """

    def __init__(self, shards: Sequence[Any], timeout_s: float = 120.0) -> None:
        self._shards, self._timeout_s = list(shards), timeout_s
        self.retries = 0
        self._threads = ThreadPoolExecutor(len(self._shards), "fiited-shard")

    def exchange(self, requests: Sequence[Request], recover: Recover) -> list[Reply]:
        """All shards' answers.

        Each shard is waited for, and if need be recovered, by a thread of its own: in a round the
        others answer only after a shard that has just been restarted has caught up.

        Raises:
            RemoteError: a shard stayed away for longer than the timeout.
        """
        sent = [shard.exchange.remote(r) for shard, r in zip(self._shards, requests)]

        def settle(index: int) -> Reply:
            answer = self._answer(index, sent[index], requests[index])
            return recover(index, answer) if isinstance(answer, Refusal) else answer

        return list(self._threads.map(settle, range(len(sent))))

    def exchange_one(self, shard: int, request: Request) -> Reply | Refusal:
        """One shard's answer (used to bring a restarted shard up to date)."""
        return self._answer(shard, self._shards[shard].exchange.remote(request), request)

    def _answer(self, index: int, ref: Any, request: Request) -> Reply | Refusal:
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                answer: Reply | Refusal = ray.get(ref, timeout=self._timeout_s)
                return answer
            except (RayActorError, GetTimeoutError) as error:
                if time.monotonic() > deadline:
                    name = f"embedding shard {index}"
                    raise RemoteError(name, str(error), "Restart from a checkpoint") from error
            self.retries += 1
            time.sleep(RETRY_S)
            ref = self._shards[index].exchange.remote(request)
