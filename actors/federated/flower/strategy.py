"""Our strategies as a strategy of a Flower ``ServerApp``: real Flower nodes, our server side.

    app = ServerApp()

    @app.main()
    def main(grid, context):
        ours = FedAvg(spec, LocalConfig(), 20, server=Yogi())
        ServerStrategy(ours, clients=100).start(grid, arrays, num_rounds=50)

Exported are strategies that need from a client its weights and its number of samples: FedAvg with
any server optimiser, robust rules, Fed-ensemble (each node gets its own model). What needs more of
a client (SCAFFOLD's control variates, q-FedAvg's losses, sketches, asynchronous rounds) is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from actors.federated.flower.grid import to_flat, to_record
from raysys.errors import ConfigError
from raysys.federated.core.aggregation import ClientTable, ModelSum
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.messages import Status
from raysys.federated.core.model import FlatWeights, layout_of
from raysys.federated.core.population import Population
from raysys.federated.core.randomness import Purpose, generator
from raysys.federated.core.strategy import JobFacts, RoundReport, SelectsDevices, Strategy


class ServerStrategy(FlowerStrategy):  # type: ignore[misc]
    """Runs one of our strategies on Flower's nodes.

    Args:
        strategy: ours. clients: nodes that may ever take part; they are numbered as they appear.
        seed: seed of selection and of what the strategy draws.

    Raises:
        ConfigError: a strategy that a Flower client cannot feed.
    """

    def __init__(self, strategy: Strategy, clients: int, seed: int = 0) -> None:
        wants = strategy.feedback_spec()
        simple = wants.weighting in ("samples", "uniform") and not wants.controls
        if not simple or wants.sketch_dim or isinstance(strategy, SelectsDevices):
            raise ConfigError(
                "strategy", type(strategy).__name__, "one that needs weights and sample counts only"
            )
        self.ours = strategy
        self._clients = clients
        self._seed = seed
        self._layout = layout_of(strategy.model_spec(0))
        self._number: dict[int, int] = {}
        self._model: dict[int, int] = {}
        self._started = False
        self.reports: list[RoundReport] = []

    def configure_train(
        self, server_round: int, arrays: Any, config: Any, grid: Any
    ) -> Iterable[Any]:
        """Choose nodes as the strategy demands and send each the model that it shall train."""
        if not self._started:
            self._start(arrays)
        config["server-round"] = server_round
        nodes = sorted(grid.get_node_ids())
        for node in nodes:
            self._number.setdefault(node, len(self._number))
        known = [node for node in nodes if self._number[node] < self._clients]
        wanted = sum(demand.clients for demand in self.ours.demand(server_round - 1))
        rng = generator(self._seed, Purpose.SELECTION, server_round)
        chosen = rng.choice(known, size=min(wanted, len(known)), replace=False).tolist()
        node_of = {self._number[node]: node for node in chosen}
        self._model = {}
        messages = []
        clients = np.array(sorted(node_of), dtype=np.int64)
        for part in self.ours.assign(server_round - 1, clients):
            weights = self.ours.weights(part.model_id)
            record = to_record(weights, self._layout.names, self._layout.shapes)
            settings = ConfigRecord({**config, "lr": part.local.lr})
            content = RecordDict({"arrays": record, "config": settings})
            for client in part.clients.tolist():
                self._model[client] = part.model_id
                messages.append(Message(content, node_of[client], MessageType.TRAIN))
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Any]) -> tuple[Any, Any]:
        """Screen and fold the replies, and let the strategy take its step."""
        answers = list(replies)
        report = self._fold(server_round - 1, answers)
        self.ours.close(server_round - 1, report)
        self.reports.append(report)
        metrics = {"clients": report.counts["ok"], "dropped": len(answers) - report.counts["ok"]}
        weights = self.ours.weights(0)
        record = to_record(weights, self._layout.names, self._layout.shapes)
        return record, MetricRecord(metrics)

    def configure_evaluate(
        self, server_round: int, arrays: Any, config: Any, grid: Any
    ) -> Iterable[Any]:
        """Nobody: evaluate on the server through ``evaluate_fn``, or with the members."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Any]) -> Any:
        """Nothing was asked."""
        return None

    def summary(self) -> None:
        """Nothing to log."""

    def _start(self, arrays: Any) -> None:
        offsets = np.arange(self._clients + 1, dtype=np.int64)
        ids = np.zeros(self._clients, dtype=np.int32)
        self.ours.start(JobFacts(Population(offsets=offsets, sample_ids=ids), self._seed))
        if isinstance(self.ours, FedAvg):  # a family or an ensemble keeps its own starts
            self.ours.reset(to_flat(arrays, self._layout.shapes))
        self._started = True

    def _fold(self, round_id: int, replies: list[Any]) -> RoundReport:
        weighting = self.ours.feedback_spec().weighting
        rows: list[tuple[int, int, int, Status]] = []
        updates: list[FlatWeights] = []
        sums: dict[int, ModelSum] = {}
        for reply in replies:
            client = self._number.get(reply.metadata.src_node_id, -1)
            if client not in self._model or client in {row[0] for row in rows}:
                continue  # not asked, or a duplicate
            delta, samples = self._read(reply, self._model[client])
            status = _status(reply, delta)
            rows.append((client, self._model[client], samples, status))
            updates.append(delta)
            if status is Status.OK:
                weight = float(samples) if weighting == "samples" else 1.0
                total = sums.setdefault(self._model[client], ModelSum(np.zeros(len(delta))))
                total.delta += weight * delta
                total.weight += weight
                total.clients += 1
        for model, total in sums.items():
            self.ours.fold(round_id, model, total)
        return self._report(round_id, rows, updates)

    def _read(self, reply: Any, model: int) -> tuple[FlatWeights, int]:
        """Update and claimed samples of a reply; NaN where it is an error or of another shape."""
        start = self.ours.weights(model)
        nothing = np.full(len(start), np.nan, dtype=np.float32)
        if reply.has_error():
            return nothing, 0
        arrays = next(iter(reply.content.array_records.values()), None)
        metrics: Any = next(iter(reply.content.metric_records.values()), {})
        try:
            flat = to_flat(arrays, self._layout.shapes)
            return flat - start, int(metrics["num-examples"])
        except (ConfigError, KeyError, TypeError, ValueError, AttributeError):
            return nothing, 0

    def _report(
        self,
        round_id: int,
        rows: list[tuple[int, int, int, Status]],
        updates: list[FlatWeights],
    ) -> RoundReport:
        columns: npt.NDArray[np.int64] = np.array(rows, dtype=np.int64).reshape(-1, 4)
        ok = columns[:, 3] == Status.OK
        nan = np.full(len(rows), np.nan, dtype=np.float32)
        delta = np.array(updates, dtype=np.float32).reshape(len(rows), self._layout.n_params)
        single = self.ours.feedback_spec().update_group > 0
        table = ClientTable(
            clients=columns[:, 0],
            rows=columns[:, 1],
            loss_first=nan,
            loss_last=nan,
            norm=np.linalg.norm(delta, axis=1).astype(np.float32),
            n_samples=columns[:, 2],
            status=columns[:, 3].astype(np.int8),
            updates=np.nan_to_num(delta) if single else None,
            update_weight=ok.astype(np.float32) if single else None,
            update_row=columns[:, 1] if single else None,
        )
        size = 4 * self._layout.n_params
        counts = {status.name.lower(): table.count(status) for status in Status}
        return RoundReport(
            round_id=round_id, attempts=1, counts=counts, loss_first=float("nan"),
            loss_last=float("nan"), bytes_down=size * len(self._model),
            bytes_up=size * int(ok.sum()), macs=0, virtual_s=0.0, table=table,
        )  # fmt: skip


def _status(reply: Any, delta: FlatWeights) -> Status:
    if reply.has_error():
        return Status.FAILED
    return Status.OK if np.isfinite(delta).all() else Status.NONFINITE
