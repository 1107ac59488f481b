"""Turns a strategy's decisions into rounds of tasks, and answers into server steps.

Pure: whoever drives it (the Ray job actor, or :class:`LocalRunner` in one process) takes the tasks
of an open round, runs them anywhere and in any order, and hands the partials back.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from raysys.config import check, check_range
from raysys.errors import ConfigError, InfeasibleError
from raysys.federated.core.aggregation import ClientTable, RoundFold
from raysys.federated.core.devices import DeviceConfig, Outcome, play_devices
from raysys.federated.core.ladder import RUNGS, static_rung
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.messages import IntArray, Partial, ScreenConfig, Status, TrainTask
from raysys.federated.core.model import ModelSpec, layout_of
from raysys.federated.core.population import Population
from raysys.federated.core.strategy import (
    Demand,
    JobFacts,
    RoundReport,
    SelectsDevices,
    StateArrays,
    Strategy,
)

NORM_MEMORY = 20
MAX_ATTEMPTS = 5


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExecutionConfig:
    """How tasks are cut and run; only speed depends on it, save for the order of float sums.

    Args:
        rung: "auto", "batched", "vmap" or "loop". Auto measures at the start, or, in
            deterministic mode, goes by the model's kind and size.
        chunk_size: clients in one tensor program. task_clients: clients in one task.
        deterministic: never let a measurement decide, so that any number of workers on any
            machine cuts and sums alike.
    """

    rung: str = "auto"
    chunk_size: int = 50
    task_clients: int = 50
    deterministic: bool = True

    def __post_init__(self) -> None:
        check(self, "rung", self.rung in ("auto", *RUNGS), f"'auto' or one of {RUNGS}")
        check_range(self, "chunk_size", 1)
        check_range(self, "task_clients", 1)


@dataclasses.dataclass(slots=True)
class Group:
    """Clients of a round that train models of one spec with one local configuration."""

    spec: ModelSpec
    local: LocalConfig
    model_ids: list[int]
    clients: IntArray
    rows: IntArray
    weights: npt.NDArray[np.float32]
    controls: npt.NDArray[np.float32] | None
    tasks: list[TrainTask] = dataclasses.field(default_factory=list)
    controls_of_task: list[npt.NDArray[np.float32] | None] = dataclasses.field(default_factory=list)
    fold: RoundFold | None = None


@dataclasses.dataclass(slots=True)
class OpenRound:
    """A round between its tasks going out and its close."""

    round_id: int
    attempt: int
    wanted: int
    groups: list[Group]
    outcome: Outcome

    def add(self, group: int, partial: Partial) -> bool:
        """Fold an answer; False for a duplicate or an answer to a closed round."""
        fold = self.groups[group].fold
        assert fold is not None
        return fold.add(partial)

    @property
    def complete(self) -> bool:
        """Whether every task has been answered."""
        return all(group.fold is not None and not group.fold.missing for group in self.groups)


class FederatedJob:
    """The state of one federated job: strategy, round number, screening statistics.

    Args:
        strategy: what to train and how to move models.
        population: the clients.
        seed: seed of everything drawn in this job.
        execution, screen, devices: how tasks run, which updates count, how devices behave.
    """

    def __init__(
        self,
        strategy: Strategy,
        population: Population,
        seed: int = 0,
        execution: ExecutionConfig | None = None,
        screen: ScreenConfig | None = None,
        devices: DeviceConfig | None = None,
    ) -> None:
        self.strategy = strategy
        self.population = population
        self.seed = seed
        self.execution = execution or ExecutionConfig()
        self.screen = screen or ScreenConfig()
        self.devices = devices or DeviceConfig()
        self.round_id = 0
        self.virtual_s = 0.0
        self.wasted_updates = 0
        self._attempt = 0
        self._norms: list[float] = []
        strategy.start(JobFacts(population, seed))

    def open_round(self) -> OpenRound:
        """Select devices, let the strategy place them, and cut the tasks of the next round."""
        demands = self.strategy.demand(self.round_id)
        wanted = sum(demand.clients for demand in demands)
        outcome = self._select(demands)
        groups = self._group(outcome.accepted)
        for group in groups:
            self._cut(group)
        return OpenRound(self.round_id, self._attempt, wanted, groups, outcome)

    def close_round(self, opened: OpenRound) -> RoundReport | None:
        """Fold the sums into the strategy; None if too little was kept and the round repeats.

        Raises:
            InfeasibleError: the round failed several times in a row.
        """
        found = [
            _named(g.fold.table(), g) if g.fold is not None and g.tasks else None
            for g in opened.groups
        ]
        answered = [0 if table is None else table.count(Status.OK) for table in found]
        tables = [table for table in found if table is not None]
        kept = sum(answered)
        if kept < self.screen.min_fraction * opened.wanted:
            self._repeat(kept, opened)
            return None
        for group in opened.groups:
            assert group.fold is not None
            for model_id, total in zip(group.model_ids, group.fold.sums()):
                self.strategy.fold(opened.round_id, model_id, total)
        report = self._report(opened, tables, answered)
        self.strategy.close(opened.round_id, report)
        if kept and self.screen.reject_factor is not None:
            norms = np.concatenate([table.norm[table.ok] for table in tables])
            self._norms = [*self._norms[1 - NORM_MEMORY :], float(np.median(norms))]
        self.virtual_s += report.virtual_s
        self.round_id += 1
        self._attempt = 0
        return report

    def state(self) -> StateArrays:
        """Everything that the next rounds depend on, as named arrays."""
        inner = {f"strategy.{name}": value for name, value in self.strategy.state().items()}
        numbers = [self.round_id, self._attempt, self.wasted_updates, self.seed]
        return {
            "job.numbers": np.array(numbers, dtype=np.int64),
            "job.execution": np.array(
                [
                    ("auto", *RUNGS).index(self.execution.rung),
                    self.execution.chunk_size,
                    self.execution.task_clients,
                ],
                dtype=np.int64,
            ),
            "job.virtual_s": np.array([self.virtual_s]),
            "job.norms": np.array(self._norms, dtype=np.float64),
            **inner,
        }

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore :meth:`state`.

        Raises:
            ConfigError: the state is of a job with another seed, or of another strategy.
        """
        numbers = [int(number) for number in state["job.numbers"]]
        if numbers[3] != self.seed:
            raise ConfigError("seed", self.seed, f"the checkpoint's seed {numbers[3]}")
        self.round_id, self._attempt, self.wasted_updates = numbers[:3]
        rung, chunk_size, task_clients = (int(number) for number in state["job.execution"])
        self.execution = dataclasses.replace(
            self.execution,
            rung=("auto", *RUNGS)[rung],
            chunk_size=chunk_size,
            task_clients=task_clients,
        )
        self.virtual_s = float(state["job.virtual_s"][0])
        self._norms = [float(norm) for norm in state["job.norms"]]
        prefix = "strategy."
        self.strategy.load({n.removeprefix(prefix): v for n, v in state.items() if prefix in n})

    def _select(self, demands: list[Demand]) -> Outcome:
        # Looked at here, for a strategy may be wrapped after the job was made, as Venn's is; by
        # name, which is what the protocol's isinstance does, slowly.
        if hasattr(self.strategy, "select"):
            chooser = cast("SelectsDevices", self.strategy)
            return chooser.select(
                self.population, self.devices, self._cost_of, self.seed, self.round_id
            )
        return play_devices(
            self.population, demands, self.devices, self._cost_of, self.seed,
            self.round_id, self._attempt, self.virtual_s,
        )  # fmt: skip

    def _group(self, clients: IntArray) -> list[Group]:
        """Merge assignments of one spec and local configuration: they train in one program."""
        merged: dict[tuple[ModelSpec, LocalConfig], list[tuple[int, IntArray]]] = {}
        key, alike = None, []
        for assignment in self.strategy.assign(self.round_id, clients):
            spec, local = self.strategy.model_spec(assignment.model_id), assignment.local
            if key is None or spec is not key[0] or local is not key[1]:  # hashing is dear
                key = (spec, local)
                alike = merged.setdefault(key, [])
            alike.append((assignment.model_id, assignment.clients))
        groups = []
        for (spec, local), parts in merged.items():
            ids = self.population.check_clients(np.concatenate([c for _, c in parts]))
            rows = np.repeat(np.arange(len(parts)), [len(c) for _, c in parts])
            groups.append(
                Group(
                    spec=spec,
                    local=local,
                    model_ids=[model_id for model_id, _ in parts],
                    clients=ids,
                    rows=rows,
                    weights=np.stack([self.strategy.weights(m) for m, _ in parts]),
                    controls=self.strategy.controls(ids),
                )
            )
        return groups

    def _cut(self, group: Group) -> None:
        """Cut a group into tasks of similar work: as many steps, then the same model, together."""
        steps = group.local.steps_of(self.population.counts(group.clients))
        order = np.lexsort((group.clients, group.rows, -steps))
        size = self.execution.task_clients
        pieces = [order[start : start + size] for start in range(0, len(order), size)]
        rung = self.execution.rung
        template = TrainTask(
            round_id=self.round_id,
            attempt=self._attempt,
            task_id=0,
            spec=group.spec,
            clients=group.clients,
            rows=group.rows,
            models=len(group.model_ids),
            local=group.local,
            feedback=self.strategy.feedback_spec(),
            seed=self.seed,
            rung=static_rung(group.spec) if rung == "auto" else rung,
            chunk_size=self.execution.chunk_size,
            clip_norm=self.screen.clip_norm,
            reject_above=self._reject_above(),
            local_noise=self.screen.local_noise,
        )
        for number, piece in enumerate(pieces):
            group.tasks.append(
                dataclasses.replace(
                    template,
                    task_id=number,
                    clients=group.clients[piece],
                    rows=group.rows[piece],
                )
            )
            part = None if group.controls is None else group.controls[piece]
            group.controls_of_task.append(part)
        sizes = [len(piece) for piece in pieces]
        models = len(group.model_ids)
        group.fold = RoundFold(self.round_id, self._attempt, sizes, group.spec.spec_id, models)

    def _reject_above(self) -> float:
        factor = self.screen.reject_factor
        if factor is None or not self._norms:
            return float("inf")
        return factor * statistics.median(self._norms)

    def _cost_of(self, clients: IntArray) -> tuple[npt.NDArray[np.float64], int]:
        """Forward-and-backward work of each client in parameters x samples, and bytes of a model.

        A dense layer costs one multiply-accumulate per parameter and sample; the backward pass
        twice that.
        """
        params = len(self.strategy.weights(0))
        local = self.strategy.local_config(self.round_id)
        counts = self.population.counts(clients)
        samples = local.steps_of(counts) * np.minimum(local.batch_size, counts)
        return 3.0 * params * samples, 4 * params

    def _repeat(self, kept: int, opened: OpenRound) -> None:
        self.wasted_updates += kept
        self._attempt += 1
        if self._attempt >= MAX_ATTEMPTS:
            raise InfeasibleError(
                f"round {opened.round_id}",
                f"only {kept} of {opened.wanted} updates were kept in {MAX_ATTEMPTS} attempts",
                "Lower the learning rate, screen.min_fraction, or the demand",
            )

    def _report(
        self, opened: OpenRound, tables: list[ClientTable], answered: list[int]
    ) -> RoundReport:
        table = join_tables(tables)
        counts = {s.name.lower(): table.count(s) for s in Status if s < Status.LATE}
        counts["late"] = len(opened.outcome.late)
        counts["failed"] = len(opened.outcome.failed) + table.count(Status.FAILED)
        ok = table.ok
        smallest = 4 * len(self.strategy.weights(0))
        group_bytes = [4 * layout_of(g.spec).n_params for g in opened.groups]
        group_work = [
            3 * layout_of(g.spec).n_params * int(_samples_trained(g, self.population).sum())
            for g in opened.groups
        ]
        return RoundReport(
            round_id=opened.round_id,
            attempts=opened.attempt + 1,
            counts=counts,
            loss_first=_mean(table.loss_first[ok]),
            loss_last=_mean(table.loss_last[ok]),
            bytes_down=sum(b * len(g.clients) for b, g in zip(group_bytes, opened.groups))
            + smallest * (counts["late"] + counts["failed"]),
            bytes_up=sum(b * n for b, n in zip(group_bytes, answered)),
            macs=sum(group_work),
            virtual_s=opened.outcome.duration_s,
            table=table,
            capacity_bias=opened.outcome.capacity_bias,
            busy_s=sum(g.fold.busy_s for g in opened.groups if g.fold is not None),
        )


def _named(table: ClientTable, group: Group) -> ClientTable:
    """The table with model ids in place of rows of the stacked weights, for its updates."""
    if table.update_row is None:
        return table
    ids = np.array(group.model_ids, dtype=np.int64)
    return dataclasses.replace(table, update_row=ids[table.update_row])


def join_tables(tables: list[ClientTable]) -> ClientTable:
    """One table of several groups' clients."""
    if len(tables) == 1:
        return tables[0]
    if not tables:
        ids, none = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
        status = np.empty(0, dtype=np.int8)
        return ClientTable(
            clients=ids, rows=ids, loss_first=none, loss_last=none, norm=none, n_samples=ids,
            status=status,
        )  # fmt: skip

    def join(name: str) -> Any:
        columns = [getattr(table, name) for table in tables]
        if any(column is None for column in columns):
            return None
        return np.concatenate(columns)

    names = [field.name for field in dataclasses.fields(ClientTable)]
    return ClientTable(**{name: join(name) for name in names})


def _samples_trained(group: Group, population: Population) -> IntArray:
    counts = population.counts(group.clients)
    trained: IntArray = group.local.steps_of(counts) * np.minimum(group.local.batch_size, counts)
    return trained


def _mean(values: npt.NDArray[np.float32]) -> float:
    return float(values.mean(dtype=np.float64)) if values.size else float("nan")
