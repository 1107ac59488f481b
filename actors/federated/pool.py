"""A pool of worker actors behind one queue: two calls in flight each, dead workers replaced.

With a single queue nobody's backlog needs stealing: whoever is free takes the next call. Results
are at most twice the number of workers ahead of whoever consumes them. Of workers with equally few
calls the one that has waited longest is next, so that even one call at a time reaches all of them,
and a dead one is noticed.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ObjectLostError,
    RayActorError,
    WorkerCrashedError,
)

from raysys.errors import RemoteError

IN_FLIGHT_PER_WORKER = 2
LOST = (
    RayActorError,
    ActorDiedError,
    ActorUnavailableError,
    ObjectLostError,
    WorkerCrashedError,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One method call for any worker; ``tag`` tells the caller what the result belongs to.

    With ``parts`` the method returns two values: the first is fetched, of the second only the
    reference, so that large results need not pass through the caller.
    """

    tag: Any
    method: str
    arguments: tuple[Any, ...]
    parts: bool = False


class WorkerPool:
    """Runs calls on worker actors.

    Args:
        make_worker: starts one worker and returns its handle.
        workers: how many.
        max_replacements: workers replaced over the pool's life before it gives up.
    """

    def __init__(
        self, make_worker: Callable[[], Any], workers: int, max_replacements: int = 20
    ) -> None:
        self._make = make_worker
        self._handles: list[Any] = [make_worker() for _ in range(workers)]
        self._load = [0] * workers
        self._last = [0] * workers  # number of the call that each was given last
        self._given = 0
        self._flying: dict[Any, tuple[int, Call]] = {}
        self._rest: dict[Any, Any] = {}
        self._max_replacements = max_replacements
        self.replaced = 0
        self.reissued = 0

    @property
    def size(self) -> int:
        """Number of workers."""
        return len(self._handles)

    def run(self, calls: Sequence[Call]) -> Iterator[tuple[Any, Any]]:
        """Yield (tag, result) of every call, in the order in which they finish.

        Raises:
            RemoteError: workers die faster than they may be replaced. An error that a call itself
                raised comes out as it was raised.
        """
        queue = collections.deque(calls)
        self._fill(queue)
        while self._flying:
            ready, _ = ray.wait(list(self._flying), num_returns=1)
            worker, call = self._flying.pop(ready[0])
            rest = self._rest.pop(ready[0], None)
            self._load[worker] -= 1
            try:
                result = ray.get(ready[0])
            except LOST as error:
                self._recover(worker, call, queue, error)
            else:
                self._fill(queue)
                yield call.tag, (result, rest) if call.parts else result
            self._fill(queue)

    def each(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method on every worker and return the results."""
        return list(ray.get([getattr(h, method).remote(*arguments) for h in self._handles]))

    def close(self) -> None:
        """End all workers; may be called twice."""
        handles, self._handles = self._handles, []
        for handle in handles:
            ray.kill(handle)
        self._flying.clear()
        self._rest.clear()

    def _fill(self, queue: collections.deque[Call]) -> None:
        while queue:
            worker = min(range(self.size), key=lambda w: (self._load[w], self._last[w]))
            if self._load[worker] >= IN_FLIGHT_PER_WORKER:
                return
            call = queue.popleft()
            method = getattr(self._handles[worker], call.method)
            if call.parts:
                ref, rest = method.options(num_returns=2).remote(*call.arguments)
                self._rest[ref] = rest
            else:
                ref = method.remote(*call.arguments)
            self._flying[ref] = (worker, call)
            self._load[worker] += 1
            self._given += 1
            self._last[worker] = self._given

    def _recover(
        self, worker: int, call: Call, queue: collections.deque[Call], error: Exception
    ) -> None:
        """Replace a dead worker and put all its calls back in front of the queue."""
        if self.replaced >= self._max_replacements:
            raise RemoteError(
                "federated worker", f"{self.replaced} workers died: {error}",
                "Look at the logs of the Ray session; memory is the usual cause",
            ) from error  # fmt: skip
        lost = [ref for ref, (owner, _) in self._flying.items() if owner == worker]
        again = [call, *(self._flying.pop(ref)[1] for ref in lost)]
        for ref in lost:
            self._rest.pop(ref, None)
        queue.extendleft(reversed(again))
        self.reissued += len(again)
        self.replaced += 1
        self._handles[worker] = self._make()
        self._load[worker] = 0
