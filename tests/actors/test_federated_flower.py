"""Flower's strategies on our engine, ours in Flower, and a NumPyClient as a client program.

Flower's pins exclude ours, so it is not in the test environment by itself; see
``requirements/flower.txt``. The benchmark ``federated`` runs the same against the whole of Flower.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from actors.session import Session
from raysys.federated.core.datasets import FederatedData, load_digits_data
from raysys.federated.core.engine import FederatedJob
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.model import Mlp, ModelSpec
from raysys.federated.core.partition import PartitionConfig, partition
from raysys.federated.core.population import Population
from raysys.federated.core.robust import RobustAvg, RobustConfig
from raysys.federated.core.runner import run_rounds
from raysys.federated.core.scaffold import Scaffold
from raysys.federated.fed_ensemble.ensemble import EnsembleConfig, FedEnsemble

pytest.importorskip(
    "flwr", reason="Flower is not here: requirements/flower.txt tells how to add it"
)

from flwr.app import ArrayRecord
from flwr.client import NumPyClient
from flwr.common import ndarrays_to_parameters
from flwr.server import strategy as older
from flwr.serverapp import strategy as current
from flwr.serverapp.strategy import FedAvg as FlowerAvg

from actors.federated.flower.clients import EngineClients, on_workers, split_flat
from actors.federated.flower.grid import EngineGrid
from actors.federated.flower.legacy import EngineServer
from actors.federated.flower.program import numpy_client_spec
from actors.federated.flower.strategy import ServerStrategy
from raysys.errors import ConfigError

SPEC = ModelSpec(architecture=Mlp(sizes=(64, 16, 10)))
LOCAL = LocalConfig(epochs=1, batch_size=10, lr=0.1)


@pytest.fixture(scope="module")
def parts() -> tuple[FederatedData, Population]:
    data = load_digits_data(0)
    return data, partition(data.targets, PartitionConfig(clients=12), 0)


def clients_of(parts: tuple[FederatedData, Population], **options: Any) -> EngineClients:
    return EngineClients(*parts, SPEC, LOCAL, **options)


def grid_of(parts: tuple[FederatedData, Population], **options: Any) -> EngineGrid:
    return EngineGrid(clients_of(parts, **options))


def start(strategy: Any, grid: EngineGrid, rounds: int = 3) -> Any:
    return strategy.start(grid, grid.initial_arrays(), num_rounds=rounds)


def test_flower_fedavg_on_our_engine_equals_ours(parts: tuple[FederatedData, Population]) -> None:
    grid = grid_of(parts)
    result = start(FlowerAvg(), grid)
    job = FederatedJob(FedAvg(SPEC, LOCAL, 12), parts[1], 0)
    # Flower counts rounds from 1 and so draws other batches; shift ours by one round.
    job.round_id = 1
    run_rounds(job, parts[0].samples(), 4)
    ours, theirs = job.strategy.weights(0), grid.flat(result.arrays)
    assert np.abs(ours - theirs).max() < 1e-5
    assert set(result.evaluate_metrics_clientapp[3]) >= {"eval_acc"}


CURRENT = [
    current.FedAdagrad(),
    current.FedAdam(),
    current.FedAvgM(),
    current.FedMedian(),
    current.FedProx(),
    current.FedTrimmedAvg(),
    current.FedYogi(),
    current.Krum(num_malicious_nodes=2),
    current.MultiKrum(num_malicious_nodes=2, num_nodes_to_select=5),
    current.Bulyan(num_malicious_nodes=2),
    current.QFedAvg(client_learning_rate=0.1, q=0.2),
    current.DifferentialPrivacyServerSideFixedClipping(FlowerAvg(), 0.1, 1.0, 12),
    current.DifferentialPrivacyServerSideAdaptiveClipping(FlowerAvg(), 0.1, 12),
]


@pytest.mark.parametrize("strategy", CURRENT, ids=lambda strategy: type(strategy).__name__)
def test_message_strategies_run(parts: tuple[FederatedData, Population], strategy: Any) -> None:
    grid = grid_of(parts)
    before = grid.flat(grid.initial_arrays())
    result = start(strategy, grid, 1)
    after = grid.flat(result.arrays)
    assert np.isfinite(after).all()
    assert not np.array_equal(after, before)


def older_strategies(start: Any) -> list[Any]:
    given = {"initial_parameters": start}
    plain = older.FedAvg(**given)
    return [
        plain,
        older.FedAdagrad(**given),
        older.FedAdam(**given),
        older.FedAvgM(**given),
        older.FedMedian(**given),
        older.FedProx(proximal_mu=0.1, **given),
        older.FedTrimmedAvg(**given),
        older.FedYogi(**given),
        older.Krum(num_malicious_clients=2, **given),
        older.Bulyan(num_malicious_clients=2, to_keep=0, **given),
        older.FaultTolerantFedAvg(**given),
        older.DifferentialPrivacyServerSideFixedClipping(plain, 0.1, 1.0, 12),
    ]


def test_older_strategies_run(parts: tuple[FederatedData, Population]) -> None:
    clients = clients_of(parts)
    start = clients.initial()
    given = ndarrays_to_parameters(split_flat(start, clients.layout.shapes))
    for strategy in older_strategies(given):
        server = EngineServer(clients, strategy)
        history, _ = server.fit(1, None)
        name = type(strategy).__name__
        assert np.isfinite(server.weights()).all(), name
        assert not np.array_equal(server.weights(), start), name
        assert len(history.losses_distributed) == 1, name


def test_older_fedavg_equals_the_current_one(parts: tuple[FederatedData, Population]) -> None:
    grid = grid_of(parts)
    expected = grid.flat(start(FlowerAvg(fraction_evaluate=0.0), grid).arrays)
    # Without weights of its own the strategy asks a client for some.
    server = EngineServer(clients_of(parts), older.FedAvg(fraction_evaluate=0.0))
    server.fit(3, None)
    assert np.abs(server.weights() - expected).max() < 1e-6


def test_a_clients_configuration_is_followed_or_refused(
    parts: tuple[FederatedData, Population],
) -> None:
    clients = clients_of(parts, ignored=("note",))
    weights, who = clients.initial()[None], np.array([0, 1], dtype=np.int64)

    def norms(*configs: dict[str, Any]) -> list[float]:
        found = clients.train(weights, np.zeros(2, dtype=np.int64), who, 1, configs)
        return [float(np.linalg.norm(u.weights - weights[0])) for u in found]

    plain = norms({}, {})
    assert norms({"server-round": 1, "note": "x"}, {"lr": 0.1}) == pytest.approx(plain)
    one, other = norms({"lr": 0.01}, {"local-epochs": 3})
    assert one < 0.5 * plain[0]
    assert other > 1.5 * plain[1]
    with pytest.raises(ConfigError, match="momentum"):
        norms({"momentum": 0.9}, {})
    with pytest.raises(ConfigError, match="lr"):
        norms({"lr": -1.0}, {})
    private = current.DifferentialPrivacyClientSideFixedClipping(FlowerAvg(), 0.1, 1.0, 12)
    with pytest.raises(ConfigError, match="clipping_norm"):
        start(private, EngineGrid(clients), 1)
    trees = current.FedXgbBagging()
    with pytest.raises(ConfigError, match="arrays"):
        trees.start(EngineGrid(clients), current_trees(), num_rounds=1)


def current_trees() -> Any:
    return ArrayRecord([np.zeros(3, dtype=np.uint8)])


def test_grid_on_ray_workers_gives_the_same(
    ray_session: Session, parts: tuple[FederatedData, Population]
) -> None:
    here = grid_of(parts)
    expected = here.flat(start(FlowerAvg(fraction_evaluate=0.0), here).arrays)
    run_tasks, pool = on_workers(*parts, workers=2, worker_cpus=0)
    there = grid_of(parts, run_tasks=run_tasks)
    found = there.flat(start(FlowerAvg(fraction_evaluate=0.0), there).arrays)
    assert np.abs(found - expected).max() < 1e-6  # threads of this process, one of a worker
    pool.close()


def test_our_strategies_run_as_a_flower_strategy(parts: tuple[FederatedData, Population]) -> None:
    for ours in (
        FedAvg(SPEC, LOCAL, 8),
        RobustAvg(SPEC, LOCAL, 8, RobustConfig()),
        FedEnsemble(EnsembleConfig(k=2), 8, lambda: FedAvg(SPEC, LOCAL, 8)),
    ):
        grid = grid_of(parts)
        exported = ServerStrategy(ours, clients=12)
        result = start(exported, grid)
        assert np.array_equal(grid.flat(result.arrays), ours.weights(0))
        assert [report.counts["ok"] for report in exported.reports] == [8, 8, 8]
    with pytest.raises(ConfigError, match="Scaffold"):
        ServerStrategy(Scaffold(SPEC, LOCAL, 8), clients=12)


class Client(NumPyClient):  # type: ignore[misc]
    """Moves the weights by its number; the third one always fails."""

    def __init__(self, number: int) -> None:
        self.number = number

    def get_parameters(self, config: Any) -> Any:
        return [np.zeros((2, 3), np.float32), np.zeros(2, np.float32)]

    def fit(self, parameters: Any, config: Any) -> Any:
        if self.number == 3:
            raise RuntimeError("broken device")
        moved = [part + np.float32(self.number) for part in parameters]
        return moved, self.number + 1, {"loss": 0.5}


def client_fn(context: Any) -> Any:
    return Client(context.node_config["partition-id"]).to_client()


def test_numpy_clients_run_as_programs_and_their_failures_count() -> None:
    spec = numpy_client_spec(f"{__name__}:client_fn", 4)
    one = Population(offsets=np.arange(5), sample_ids=np.zeros(4, np.int32))
    job = FederatedJob(FedAvg(spec, LOCAL, 4), one, 0)
    job.screen = job.screen.__class__(min_fraction=0.5)
    start = job.strategy.weights(0)
    reports = run_rounds(job, load_digits_data(0).samples(), 1)
    assert reports[0].counts["ok"] == 3
    assert reports[0].counts["failed"] == 1
    mean = (0 * 1 + 1 * 2 + 2 * 3) / 6
    assert job.strategy.weights(0) - start == pytest.approx(np.full(8, mean), abs=1e-6)
