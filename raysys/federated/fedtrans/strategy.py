"""FedTrans as a strategy of the federated core: a family of model lines behind one job."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from raysys.errors import ConfigError, InfeasibleError
from raysys.federated.core.aggregation import ModelSum
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.messages import FeedbackSpec, IntArray
from raysys.federated.core.model import FlatWeights, ModelSpec, Weights
from raysys.federated.core.randomness import Purpose, torch_seed
from raysys.federated.core.strategy import Assignment, Demand, JobFacts, RoundReport, StateArrays
from raysys.federated.fedtrans.clients import BoolArray, ClientManager
from raysys.federated.fedtrans.config import FedTransConfig
from raysys.federated.fedtrans.growth import (
    Transformation,
    activeness,
    plan_transformation,
)
from raysys.federated.fedtrans.journal import Journal, Transition, Verdict
from raysys.federated.fedtrans.lineage import (
    Model,
    check_family,
    derive,
    first_model,
    model_from_json,
    similarity,
)
from raysys.federated.fedtrans.mixture import borrowed, mixed
from raysys.federated.fedtrans.network import CellNet
from raysys.federated.fedtrans.transform import apply_step, apply_weights

MakeLine = Callable[[ModelSpec, Weights | None], FedAvg]


class FedTrans:
    """A family of models that grows while it is trained.

    Args:
        net: the first model; every device that takes part must be able to run it.
        clients_per_round: answers wanted in a round, over all models.
        make_line: builds one model line (FedAvg or a relative) of a spec, from given weights or
            from the job's seed; called once per model, so that moments stay with their model.
        config: settings.
    """

    def __init__(
        self,
        net: CellNet,
        clients_per_round: int,
        make_line: MakeLine,
        config: FedTransConfig | None = None,
    ) -> None:
        self.config = config or FedTransConfig()
        self.clients_per_round = clients_per_round
        self.journal = Journal(self.config.growth)
        self._make_line = make_line
        self._family: list[Model] = [first_model(net)]
        self._lines: list[FedAvg] = [make_line(net.spec(), None)]
        self._manager: ClientManager | None = None
        self._alike = np.ones((1, 1))
        self._seed = 0
        self._placed: dict[int, int] = {}
        self._folded: dict[int, ModelSum] = {}

    @property
    def manager(self) -> ClientManager:
        """Utilities and capacities, once the job has started."""
        if self._manager is None:
            raise ConfigError("strategy", "not started", "start() before use")
        return self._manager

    def family(self) -> list[Model]:
        """All models in order of creation, the retired ones too."""
        return list(self._family)

    def macs(self) -> list[int]:
        """Multiply-accumulates of one sample, by model."""
        return [model.net.macs() for model in self._family]

    def resize(self, clients: IntArray, rate_mac_s: npt.NDArray[np.float64]) -> None:
        """Take note that devices have become faster or slower, [k]; it counts from the next draw.

        Raises:
            ConfigError: a rate that is not a finite number above 0.
        """
        self.manager.resize(clients, rate_mac_s * self.config.assignment.sample_s)

    def start(self, facts: JobFacts) -> None:
        """Take note of the population and start the first line.

        Raises:
            InfeasibleError: too few devices can run the first model.
        """
        self._seed = facts.seed
        rates = facts.population.rate_mac_s
        n = facts.population.n_clients
        sample_s = self.config.assignment.sample_s
        capacity = np.full(n, np.inf) if rates is None else rates * sample_s
        self._manager = ClientManager(capacity, self.config.assignment, facts.seed)
        able = int((capacity >= self._family[0].net.macs()).sum())
        if able < self.clients_per_round:
            raise InfeasibleError(
                f"{self.clients_per_round} clients a round",
                f"only {able} of {n} devices can run the first model",
                "Start with a smaller model, or lower clients_per_round",
            )
        self._lines[0].start(facts)

    def model_spec(self, model_id: int) -> ModelSpec:
        """Spec of one model."""
        return self._lines[model_id].spec

    def demand(self, round_id: int) -> list[Demand]:
        """One stream of devices that can run the smallest model."""
        self._placed.clear()
        smallest = self._family[0].net.macs() / self.config.assignment.sample_s
        return [Demand(clients=self.clients_per_round, min_mac_s=smallest)]

    def assign(self, round_id: int, clients: IntArray) -> list[Assignment]:
        """Draw a model for each device; a device too weak for all of them is left out."""
        models = self.manager.place(round_id, clients, self._allowed(clients))
        self._placed.update(zip(clients.tolist(), models.tolist()))
        return [
            dataclasses.replace(part, model_id=model)
            for model in np.unique(models[models >= 0]).tolist()
            for part in self._lines[model].assign(round_id, clients[models == model])
        ]

    def placed(self, clients: IntArray) -> IntArray:
        """Model that each device of the open (or last) round was given, int64 [k]."""
        return np.array([self._placed[client] for client in clients.tolist()], dtype=np.int64)

    def local_config(self, round_id: int) -> LocalConfig:
        """That of the first line."""
        return self._lines[0].local

    def weights(self, model_id: int) -> FlatWeights:
        """Current weights of a model, float32 [P]."""
        return self._lines[model_id].weights(0)

    def feedback_spec(self) -> FeedbackSpec:
        """What the lines ask for."""
        return self._lines[0].feedback_spec()

    def controls(self, clients: IntArray) -> npt.NDArray[np.float32] | None:
        """No corrections: control variates have one model's shape."""
        return None

    def fold(self, round_id: int, model_id: int, total: ModelSum) -> None:
        """Keep the model's sums until the round closes; one retired meanwhile takes them too.

        Raises:
            ConfigError: there is no such model.
        """
        if not 0 <= model_id < len(self._lines):
            raise ConfigError("model_id", model_id, f"one of {len(self._lines)} models")
        self._folded[model_id] = total

    def close(self, round_id: int, report: RoundReport) -> None:
        """Server steps, mixtures, utilities, and perhaps a new model."""
        folded, self._folded = self._folded, {}
        self.journal.round_id = round_id
        before = [line.weights(0) for line in self._lines]
        self._step(round_id, folded, report)
        self._learn(round_id, report)
        newest = len(self._family) - 1
        if newest in folded and folded[newest].weight > 0:
            self._watch(newest, folded[newest], before[newest], report)
        self._retire(round_id)
        verdict = self.verdict(round_id)
        if verdict.go:
            self.transform_now(round_id + 1, verdict=verdict)

    def predict_plan(self, client: int) -> list[tuple[int, float]]:
        """The model deployed on a client; the smallest where none fits."""
        return [(max(0, self.best_model(client)), 1.0)]

    def best_model(self, client: int) -> int:
        """Model with the highest utility among those that fit; -1 if none does."""
        return int(self.best_models(np.array([client]))[0])

    def best_models(self, clients: IntArray) -> IntArray:
        """:meth:`best_model` of many clients, int64 [k]."""
        return self.manager.best(clients, self._allowed(clients), self.macs())

    def similarity(self, first: int, second: int) -> float:
        """Similarity of two models, in [0, 1]."""
        return similarity(self._family, first, second)

    def retire(self, model_id: int, round_id: int) -> None:
        """Take a model out of training and deployment.

        Raises:
            ConfigError: it is the first, which the weakest devices need.
        """
        if model_id == 0:
            raise ConfigError("model", 0, "any but the first, which the weakest devices need")
        self._family[model_id] = dataclasses.replace(self._family[model_id], retired=round_id)

    def verdict(self, round_id: int) -> Verdict:
        """Whether the newest model should be transformed after a round, and why or why not."""
        models = sum(model.retired is None for model in self._family)
        return self.journal.verdict(round_id, models, self._family[-1].net.macs())

    def transform_now(
        self, round_id: int, cells: list[int] | None = None, verdict: Verdict | None = None
    ) -> Transformation | None:
        """Derive a new model from the newest one.

        Args:
            cells: transform exactly these, instead of the most active.
            verdict: the grounds, for the record.

        Returns:
            What was done and why, or None where nothing was measured yet.
        """
        newest = len(self._family) - 1
        model = self._family[newest]
        active = self.journal.activeness(len(model.net.cells), cells)
        if active is None:
            return None
        growth = self.config.growth
        child = len(self._family)
        plan = plan_transformation(
            model, active, growth, self.journal.largest_capacity(), self._seed, child
        )
        self.journal.note(Transition(round_id, newest, plan, verdict))
        if plan.steps:
            self._add(derive(model, newest, plan.steps, round_id), newest)
        return plan

    def explain_transform(self) -> list[Transition]:
        """All decisions to grow so far, with the figures behind them."""
        return list(self.journal.transitions)

    def state(self) -> StateArrays:
        """Family, lines, utilities, windows: exactly what the next rounds depend on."""
        records = json.dumps([model.to_json() for model in self._family])
        lines = {
            f"line{k}.{name}": value
            for k, line in enumerate(self._lines)
            for name, value in line.state().items()
        }
        clients = {f"clients.{name}": value for name, value in self.manager.state().items()}
        journal = {f"journal.{name}": value for name, value in self.journal.state().items()}
        family = np.frombuffer(records.encode(), dtype=np.uint8).copy()
        return {"family": family, **lines, **clients, **journal}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore :meth:`state`.

        Raises:
            ConfigError: the state is of another strategy or another first model.
        """
        if "family" not in state:
            raise ConfigError("state", sorted(state), "a state of FedTrans")
        records = json.loads(np.asarray(state["family"], dtype=np.uint8).tobytes().decode())
        family = [model_from_json(record) for record in records]
        if family[0].net != self._family[0].net:
            raise ConfigError("net", self._family[0].net, f"the checkpoint's {family[0].net}")
        check_family(family)
        self._family = family
        self._lines = []
        for k, model in enumerate(family):
            inner = _strip(state, f"line{k}.")
            spec = model.net.spec()
            line = self._make_line(spec, Weights(inner["weights"], spec.spec_id))
            line.load(inner)
            self._lines.append(line)
        self.manager.load(_strip(state, "clients."))
        self.journal.load(_strip(state, "journal."))
        self._update_similarity()

    def _allowed(self, clients: IntArray) -> BoolArray:
        active = np.array([model.retired is None for model in self._family])
        return self.manager.compatible(clients, self.macs(), active)

    def _step(self, round_id: int, folded: Mapping[int, ModelSum], report: RoundReport) -> None:
        """Server steps and mixtures; models without participants only lend."""
        config = self.config.mixture
        for index, own in folded.items():
            lend = config.what == "updates"
            total = borrowed(self._family, folded, index, round_id, config) if lend else own
            self._lines[index].fold(round_id, 0, total)
        for line in self._lines:
            line.close(round_id, report)
        if config.what == "weights":
            # All from the un-mixed values: no chain effects within a round.
            unmixed = [line.weights(0) for line in self._lines]
            for index in folded:
                values = mixed(self._family, unmixed, index, round_id, config)
                if values is not unmixed[index]:
                    self._lines[index].replace(values)

    def _learn(self, round_id: int, report: RoundReport) -> None:
        table = report.table
        clients = table.clients[table.ok]
        models = self.placed(clients)
        losses = 0.5 * (table.loss_first[table.ok] + table.loss_last[table.ok])
        self.manager.learn(
            clients, models, losses.astype(np.float64), self._allowed(clients), self._alike
        )
        self.journal.participants(models, self.manager.capacity[clients], len(self._family))
        newest = models == len(self._family) - 1
        samples = table.n_samples[table.ok][newest]
        if samples.sum() > 0:
            self.journal.loss(float(np.average(losses[newest], weights=samples)))

    def _watch(
        self, newest: int, total: ModelSum, before: FlatWeights, report: RoundReport
    ) -> None:
        local = self.local_config(report.round_id)
        counts = report.table.n_samples[report.table.ok]
        steps = float(local.steps_of(counts).mean()) if len(counts) else 1.0
        gradient = total.mean() / (local.lr * max(1.0, steps))
        self.journal.active(activeness(self._family[newest].net, gradient, before))

    def _retire(self, round_id: int) -> None:
        share = self.journal.shares(self.config.assignment.retire_rounds, len(self._family))
        if share is None:
            return
        for index in range(1, len(self._family) - 1):
            model = self._family[index]
            aged = round_id - model.created >= self.config.assignment.retire_rounds
            rare = share[index] < self.config.assignment.retire_share
            if model.retired is None and aged and rare:
                self.retire(index, round_id)

    def _add(self, child: Model, parent: int) -> None:
        spec = child.net.spec()
        if self.config.growth.warm_start:
            values, net = self.weights(parent), self._family[parent].net
            for step in child.steps:
                values, net = apply_weights(net, values, step), apply_step(net, step)
        else:
            values = child.net.initial(
                torch_seed(self._seed, Purpose.INITIALISATION, 1000 + len(self._family))
            )
        self._family.append(child)
        self._lines.append(self._make_line(spec, Weights(values, spec.spec_id)))
        self.manager.inherit(parent)
        self._update_similarity()
        self.journal.restart()

    def _update_similarity(self) -> None:
        n = len(self._family)
        self._alike = np.array([[self.similarity(i, j) for j in range(n)] for i in range(n)])


def _strip(state: Mapping[str, npt.NDArray[Any]], prefix: str) -> dict[str, npt.NDArray[Any]]:
    return {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
