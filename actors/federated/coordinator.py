"""The coordinator of one federated job: opens rounds, hands tasks to workers, keeps checkpoints.

The decisions are the core's (:class:`raysys.federated.core.engine.FederatedJob`); this class moves
them through Ray. Weights go into the object store once a round and travel as a reference. After a
restart it continues from the last checkpoint, which is the end of a round, and repeats what was
lost; since results are pure functions of their arguments, the outcome is the same.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from actors.federated.cohorts import explain
from actors.federated.combiner import CombinerActor, combined
from actors.federated.pool import Call, WorkerPool
from actors.federated.worker import WorkerActor
from raysys.errors import RaysysError
from raysys.federated.core.calibration import choose
from raysys.federated.core.datasets import FederatedData
from raysys.federated.core.engine import FederatedJob, OpenRound
from raysys.federated.core.evaluation import Score, mean_score, percentiles
from raysys.federated.core.messages import Partial
from raysys.federated.core.model import FlatWeights
from raysys.federated.core.population import Population
from raysys.federated.core.privacy import GivesGuarantee
from raysys.federated.core.serialize import pack_arrays, unpack_arrays
from raysys.federated.core.strategy import RoundReport
from raysys.runs import RunDirectory

CHECKPOINT_FILE = "state.arrow"
HISTORY_FILE = "rounds.json"
EXPLAIN_FILE = "explain.json"
PROBE_CLIENTS = 256
KEEP_SUMMARIES = 16
WORKERS_PER_COMBINER = 8
INLINE_BYTES = 96 * 1024  # Ray keeps arguments below 100 KiB in the call itself


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataRefs:
    """References to the arrays every worker maps; made once by :func:`put_data`."""

    inputs: Any
    targets: Any
    test_inputs: Any
    test_targets: Any
    population: Any


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RoundSummary:
    """What a person or a plot wants to know of a round; the table stays with the strategy.

    Args:
        score: central evaluation after the round, where one was asked for.
        spread: accuracy over clients by percentile name, where one was asked for.
    """

    round_id: int
    attempts: int
    counts: dict[str, int]
    loss_first: float
    loss_last: float
    bytes_down: int
    bytes_up: int
    macs: int
    virtual_s: float
    duration_s: float
    busy_s: float
    capacity_bias: float | None
    score: Score | None = None
    spread: dict[str, float] | None = None


class JobActor:
    """Runs one job.

    Args:
        make_job: builds the job; called again after a restart.
        data: references to the shared arrays.
        workers: number of worker actors. worker_cpus: logical CPUs of each.
        run_uri: run directory for checkpoints, or None for none.
        checkpoint_every: rounds between checkpoints; 0 for none.
        evaluate_every: rounds between central evaluations; 0 for none.
        combiners: actors that add blocks of tasks, so that the coordinator fetches fewer sums;
            None takes one per eight workers beyond the first eight.
    """

    def __init__(
        self,
        make_job: Callable[[Population], FederatedJob],
        data: DataRefs,
        *,
        workers: int = 2,
        worker_cpus: float = 1,
        run_uri: str | None = None,
        checkpoint_every: int = 0,
        evaluate_every: int = 0,
        combiners: int | None = None,
    ) -> None:
        self._job = make_job(ray.get(data.population))
        self._run = None if run_uri is None else RunDirectory.open(run_uri)
        self._checkpoint_every = checkpoint_every
        self._evaluate_every = evaluate_every
        self._recent: collections.deque[RoundSummary] = collections.deque(
            maxlen=KEEP_SUMMARIES + 2 * checkpoint_every
        )
        restored = self._restore()
        remote = ray.remote(WorkerActor).options(num_cpus=worker_cpus, max_restarts=0)
        parts = (data.inputs, data.targets, data.test_inputs, data.test_targets, data.population)
        self._pool = WorkerPool(lambda: remote.remote(*parts), workers)
        count = (workers - 1) // WORKERS_PER_COMBINER if combiners is None else combiners
        self._combiners: WorkerPool | None = None
        if count:
            combiner = ray.remote(CombinerActor).options(num_cpus=0, max_restarts=0)
            self._combiners = WorkerPool(combiner.remote, count)
        self._speed: dict[str, float] = {}
        if not restored:
            self._calibrate()

    def advance(self, have: int, until: int, max_s: float = float("inf")) -> list[RoundSummary]:
        """Run rounds up to number ``until``, but at least one and no more than ``max_s``.

        Safe to repeat: a round that is already done is not run again, and its summary is returned
        as long as it is one of the last few.

        Args:
            have: number of rounds whose summaries the caller holds.

        Raises:
            InfeasibleError: a round failed several times in a row.
            RemoteError: workers die faster than they may be replaced.
        """
        begin = time.monotonic()
        summaries = [s for s in self._recent if s.round_id >= have]
        while self._job.round_id < until:
            summaries.append(self._round(last=self._job.round_id + 1 == until))
            if time.monotonic() - begin >= max_s:
                break
        return [s for s in summaries if s.round_id >= have]

    def weights(self, model_id: int = 0) -> FlatWeights:
        """Current weights of a model, float32 [P]."""
        return self._job.strategy.weights(model_id)

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """The job's complete state, as in a checkpoint."""
        return self._job.state()

    def explain(self) -> dict[str, Any]:
        """What the strategy has to say about its decisions, JSON-ready; empty for most."""
        return explain(self._job.strategy)

    def health(self) -> dict[str, Any]:
        """Round number, worker facts, replaced workers, and what calibration chose."""
        return {
            "pid": os.getpid(),
            "round": self._job.round_id,
            "workers": self._pool.each("health"),
            "replaced": self._pool.replaced,
            "reissued": self._pool.reissued,
            "rung": self._job.execution.rung,
            "task_clients": self._job.execution.task_clients,
            "clients_per_second": self._speed,
            "cpu_s": time.process_time(),
            "combiners": 0 if self._combiners is None else self._combiners.size,
            "privacy": self._guarantee(),
        }

    def _guarantee(self) -> dict[str, Any] | None:
        strategy = self._job.strategy
        found = strategy.guarantee() if isinstance(strategy, GivesGuarantee) else None
        return None if found is None else dataclasses.asdict(found)

    def close(self) -> None:
        """End the workers; may be called twice."""
        self._pool.close()
        if self._combiners is not None:
            self._combiners.close()

    def _round(self, last: bool) -> RoundSummary:
        begin = time.monotonic()
        report = None
        while report is None:
            opened = self._job.open_round()
            for group, partial in self._answers(opened):
                opened.add(group, partial)
            report = self._job.close_round(opened)
        summary = _summarise(report, time.monotonic() - begin)
        done = report.round_id + 1
        if self._evaluate_every and (done % self._evaluate_every == 0 or last):
            summary = self._with_scores(summary)
        self._recent.append(summary)
        every = self._checkpoint_every
        if self._run is not None and every and (done % every == 0 or last):
            self._save(done)
        return summary

    def _answers(self, opened: OpenRound) -> Iterator[tuple[int, Partial]]:
        """(group, partial) of every task, straight from the workers or through combiners."""
        found = self._pool.run(self._calls(opened))
        if self._combiners is None:
            for (group, _), partial in found:
                yield group, partial
        else:
            yield from combined(dict(found), self._combiners)

    def _calls(self, opened: OpenRound) -> list[Call]:
        calls = []
        split = self._combiners is not None
        method = "train_split" if split else "train"
        for number, group in enumerate(opened.groups):
            weights = _sendable(group.weights)
            for task, controls in zip(group.tasks, group.controls_of_task):
                arguments = (weights, task) if controls is None else (weights, task, controls)
                calls.append(Call((number, task.task_id), method, arguments, split))
        return calls

    def _with_scores(self, summary: RoundSummary) -> RoundSummary:
        """Score what predicts, on a sample of clients: centrally, and on each one's own samples.

        Clients that are served by the same models are scored together; the central score is the
        mean over the sampled clients.
        """
        strategy, population = self._job.strategy, self._job.population
        step = max(1, population.n_clients // PROBE_CLIENTS)
        served: dict[tuple[tuple[int, float], ...], list[int]] = {}
        for client in range(0, population.n_clients, step):
            served.setdefault(tuple(strategy.predict_plan(client)), []).append(client)
        calls = []
        for number, (plan, clients) in enumerate(served.items()):
            models, mix = (list(part) for part in zip(*plan))
            spec = strategy.model_spec(models[0])
            stacked = ray.put(np.stack([strategy.weights(model) for model in models]))
            ids = np.array(clients, dtype=np.int64)
            calls.append(Call(("score", number), "evaluate", (stacked, spec, mix)))
            calls.append(Call(("spread", number), "client_scores", (stacked, spec, mix, ids)))
        found = dict(self._pool.run(calls))
        counts = [len(clients) for clients in served.values()]
        score = mean_score([found["score", k] for k in range(len(counts))], counts)
        spread = percentiles(np.concatenate([found["spread", k] for k in range(len(counts))]))
        return dataclasses.replace(summary, score=score, spread=spread)

    def _calibrate(self) -> None:
        execution = self._job.execution
        if execution.rung != "auto" or execution.deterministic:
            return
        opened = self._job.open_round()
        group = opened.groups[0]
        call = Call("speed", "calibrate", (group.weights, group.tasks[0]))
        for _, speed in self._pool.run([call]):
            self._speed = speed
        self._job.execution = choose(self._speed, execution, opened.wanted, self._pool.size)

    def _save(self, done: int) -> None:
        assert self._run is not None
        history = [dataclasses.asdict(summary) for summary in self._recent]
        files = {
            CHECKPOINT_FILE: pack_arrays(self._job.state()),
            HISTORY_FILE: json.dumps(history).encode(),
            EXPLAIN_FILE: json.dumps(self.explain()).encode(),
        }
        self._run.save_checkpoint(done, files)

    def _restore(self) -> bool:
        """Load the newest checkpoint that can be read; whether there was one."""
        if self._run is None:
            return False
        problem: RaysysError | None = None
        for step in reversed(self._run.checkpoints()):
            try:
                found = self._run.load_checkpoint(step)
                assert found is not None
                content = found[1][CHECKPOINT_FILE]
                self._job.load(unpack_arrays(content, f"checkpoint {step}"))
                self._recent.extend(_read_history(found[1][HISTORY_FILE]))
            except (RaysysError, KeyError) as error:
                problem = error if isinstance(error, RaysysError) else problem
            else:
                return True
        if problem is not None:
            raise problem
        return False


def put_data(data: FederatedData, population: Population) -> DataRefs:
    """Put the shared arrays into the object store, once."""
    return DataRefs(
        inputs=ray.put(data.inputs),
        targets=ray.put(data.targets),
        test_inputs=ray.put(data.test_inputs),
        test_targets=ray.put(data.test_targets),
        population=ray.put(population),
    )


def _sendable(weights: npt.NDArray[np.float32]) -> Any:
    """A reference into the object store, or the array itself where it is small.

    A small array inside each call is cheaper than a trip of every worker to the store.
    """
    return weights if weights.nbytes <= INLINE_BYTES else ray.put(weights)


def _read_history(content: bytes) -> list[RoundSummary]:
    rows = json.loads(content)
    for row in rows:
        row["score"] = None if row["score"] is None else Score(**row["score"])
    return [RoundSummary(**row) for row in rows]


def _summarise(report: RoundReport, duration_s: float) -> RoundSummary:
    names = [field.name for field in dataclasses.fields(RoundSummary)]
    shared = {n: getattr(report, n) for n in names if hasattr(report, n) and n != "counts"}
    shared.update(counts=dict(report.counts), duration_s=duration_s)
    return RoundSummary(**shared)
