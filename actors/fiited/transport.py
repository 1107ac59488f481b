"""Requests to shard actors, repeated until answered: exchanges are safe to repeat."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from raysys.errors import RemoteError
from raysys.training.fiited.sharding import Refusal, Reply, Request

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

    def exchange(self, requests: Sequence[Request]) -> list[Reply | Refusal]:
        """All shards' answers.

        Raises:
            RemoteError: a shard stayed away for longer than the timeout.
        """
        sent = [shard.exchange.remote(r) for shard, r in zip(self._shards, requests)]
        return [self._answer(i, ref, requests[i]) for i, ref in enumerate(sent)]

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
