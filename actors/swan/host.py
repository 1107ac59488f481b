"""Swan on a host that is a Ray node: one engine per host, found by name, steered from anywhere.

The actor owns the engine and runs training functions in its own process; it is a plain class, and
the job applies ``ray.remote``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from actors.swan.engine import EngineConfig, Swan
from raysys.config import config_from_dict
from raysys.errors import InfeasibleError
from raysys.federated.swan.topology import Topology

DEFAULT_LOCK = "/tmp/raysys-swan.lock"
# One call may train while others look or steer.
CONCURRENCY = 4


def host_options(node_id: str, namespace: str) -> dict[str, Any]:
    """Options of the actor of one Ray node: pinned there, found by name, restarted by Ray.

    It reserves no logical CPUs: it takes what others leave, which is its point.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {
        "name": f"raysys/swan/{node_id[:12]}",
        "namespace": namespace,
        "num_cpus": 0,
        "max_restarts": -1,
        "max_concurrency": CONCURRENCY,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False),
    }


class SwanHost:
    """One host's engine.

    Args:
        config: plain values of :class:`EngineConfig`; its lock defaults to one per host, so that
            two actors on a host cannot both train.
        topology: what to use instead of discovery.
    """

    def __init__(
        self, config: dict[str, Any] | None = None, topology: Topology | None = None
    ) -> None:
        values = {"lock": DEFAULT_LOCK, **(config or {})}
        self._config = config_from_dict(EngineConfig, values)
        self._topology = topology
        self._guard = threading.Lock()
        self._engine: Swan | None = None
        self._last: dict[str, Any] = {}

    def train(self, program: Callable[..., Any], **arguments: Any) -> Any:
        """Run ``program(swan, **arguments)`` under an engine and return what it returns.

        Call it through the actor; it trains until the program returns.

        Raises:
            InfeasibleError: this host trains already.
        """
        with self._guard:
            if self._engine is not None:
                raise InfeasibleError("a second task", "this host trains already", "Wait for it")
            self._engine = engine = Swan(self._config, topology=self._topology)
        done: Future[Any] = Future()

        def run() -> None:
            try:
                with engine:
                    done.set_result(program(engine, **arguments))
            except BaseException as error:
                done.set_exception(error)

        # A thread of its own, so that its number of threads is nobody else's.
        worker = threading.Thread(target=run, name="swan-train")
        worker.start()
        worker.join()
        with self._guard:
            self._last = {**engine.status(), "events": engine.events[-20:]}
            self._engine = None
        return done.result()

    def pause(self) -> None:
        """Ask the running task to pause at its next step end; nothing without one."""
        with self._guard:
            if self._engine is not None:
                self._engine.pause()

    def resume(self) -> None:
        """Take :meth:`pause` back."""
        with self._guard:
            if self._engine is not None:
                self._engine.resume()

    def health(self) -> dict[str, Any]:
        """State of the engine, or of the last task."""
        with self._guard:
            running = self._engine is not None
            state = self._engine.status() if self._engine is not None else self._last
            return {"training": running, **state}

    def close(self) -> None:
        """Let the engine go; may be called twice."""
        with self._guard:
            if self._engine is not None:
                self._engine.stop()
