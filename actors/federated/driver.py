"""Starts a federated job on Ray and follows it through restarts of its coordinator."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.exceptions import RayActorError

from actors.federated.coordinator import JobActor, RoundSummary, put_data
from raysys.errors import RemoteError
from raysys.federated.core.datasets import FederatedData
from raysys.federated.core.engine import FederatedJob
from raysys.federated.core.model import FlatWeights, ModelSpec
from raysys.federated.core.population import Population
from raysys.federated.core.recipe import FederatedConfig, make_job

MAX_RESTARTS = 5
MakeJob = Callable[[Population], FederatedJob]


class FederatedRun:
    """A running job.

    Args:
        config: the recipe. data, population, spec: what it was built from.
        workers, worker_cpus, run_uri, checkpoint_every, evaluate_every, combiners: as in
            :class:`~actors.federated.coordinator.JobActor`.
        slice_s: longest wait for the next summaries.
        make: builds the job from the population on the coordinator; by default the recipe's.
    """

    def __init__(
        self,
        config: FederatedConfig,
        data: FederatedData,
        population: Population,
        spec: ModelSpec,
        *,
        workers: int = 2,
        worker_cpus: float = 1,
        run_uri: str | None = None,
        checkpoint_every: int = 0,
        evaluate_every: int = 0,
        combiners: int | None = None,
        slice_s: float = 1.0,
        make: MakeJob | None = None,
    ) -> None:
        # The references live here, so that they outlive a restart of the coordinator.
        self._data = put_data(data, population)
        self._slice_s = slice_s
        self._options = {
            "workers": workers,
            "worker_cpus": worker_cpus,
            "run_uri": run_uri,
            "checkpoint_every": checkpoint_every,
            "evaluate_every": evaluate_every,
            "combiners": combiners,
        }
        self._make = make or functools.partial(_build, config, spec)
        self._make(population)  # a wrong configuration shows here, not in a remote traceback
        self.actor: Any = self._start()
        self.restarts = 0
        self._done = 0

    def rounds(self, until: int, have: int = 0) -> Iterator[RoundSummary]:
        """Yield the summary of each round from ``have`` up to ``until``, as they come.

        Raises:
            RemoteError: the coordinator keeps dying.
        """
        while have < until:
            try:
                summaries = ray.get(self.actor.advance.remote(have, until, self._slice_s))
            except RayActorError as error:
                self._restart(error)
                continue
            for summary in summaries:
                have = summary.round_id + 1
                self._done = max(self._done, have)
                yield summary

    def weights(self, model_id: int = 0) -> FlatWeights:
        """Current weights of a model."""
        values: FlatWeights = self._ask("weights", model_id)
        return values

    def explain(self) -> dict[str, Any]:
        """See :meth:`JobActor.explain`."""
        facts: dict[str, Any] = ray.get(self.actor.explain.remote())
        return facts

    def health(self) -> dict[str, Any]:
        """See :meth:`JobActor.health`."""
        facts: dict[str, Any] = self._ask("health")
        return facts

    def close(self) -> None:
        """End the coordinator and, with it, its workers; may be called twice."""
        ray.kill(self.actor)

    def _ask(self, method: str, *arguments: Any) -> Any:
        """Call the coordinator; one that died is replaced and brought to where it was."""
        behind = False
        while True:
            try:
                if behind:
                    ray.get(self.actor.advance.remote(self._done, self._done))
                return ray.get(getattr(self.actor, method).remote(*arguments))
            except RayActorError as error:
                self._restart(error)
                behind = True

    def _start(self) -> Any:
        remote = ray.remote(JobActor).options(num_cpus=0, max_restarts=0)
        return remote.remote(self._make, self._data, **self._options)

    def _restart(self, error: RayActorError) -> None:
        """Start a new coordinator in place of a dead one; it goes on from the last checkpoint."""
        # A constructor that fails would fail again: a damaged checkpoint, a wrong configuration.
        if self.restarts >= MAX_RESTARTS or getattr(error, "actor_init_failed", False):
            raise RemoteError(
                "federated coordinator", str(error).strip().splitlines()[-1],
                "Resume the run with --resume; look at the Ray logs for the cause",
            ) from error  # fmt: skip
        self.restarts += 1
        # Its workers die with their owner; kill the actor in case it is only unreachable.
        ray.kill(self.actor)
        self.actor = self._start()


def _build(config: FederatedConfig, spec: ModelSpec, population: Population) -> FederatedJob:
    return make_job(config, spec, population)
