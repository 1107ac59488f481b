"""What comes from outside: updates as bytes, client programs, natural and own data sets."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysys.errors import CapabilityError, ConfigError, DataError
from raysys.federated.core.engine import FederatedJob
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.intake import TaskIntake, Update, Verdict, pack_update
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.messages import FeedbackSpec, ScreenConfig, Status
from raysys.federated.core.model import Mlp, ModelSpec
from raysys.federated.core.natural_data import (
    load_client_csv,
    load_leaf_data,
    load_movielens_data,
    load_shakespeare_data,
)
from raysys.federated.core.own_data import load_cifar_data
from raysys.federated.core.population import Population
from raysys.federated.core.program import Arrays, Fitted, FromProgram
from raysys.federated.core.recipe import (
    DataConfig,
    FederatedConfig,
    ModelConfig,
    PartitionConfig,
    load_data,
    make_job,
    make_population,
)
from raysys.federated.core.runner import run_rounds
from raysys.federated.core.training import train_task

RECIPE = FederatedConfig(seed=1, clients_per_round=8, model=ModelConfig(hidden=(4,)))


@pytest.fixture(scope="module")
def opened() -> tuple[Any, Any, Any]:
    """An open round's task, its population, and the simulated partial with single updates."""
    data = load_data(RECIPE.data, 1, None)
    population = make_population(RECIPE, data)
    group = make_job(RECIPE, RECIPE.model.spec(data), population).open_round().groups[0]
    task = dataclasses.replace(group.tasks[0], feedback=FeedbackSpec(update_group=1))
    return task, population, train_task(task, group.weights, data.samples(), population)


def update_of(task: Any, partial: Any, place: int, **changes: Any) -> Update:
    facts = {
        "spec_id": task.spec.spec_id,
        "round_id": 0,
        "attempt": 0,
        "client": int(task.clients[place]),
        "n_samples": int(partial.n_samples[place]),
        "delta": partial.updates[place],
    }
    return Update(**{**facts, **changes})


def test_updates_as_bytes_give_the_same_sum_in_any_order(opened: tuple[Any, Any, Any]) -> None:
    task, population, partial = opened
    sums = []
    for order in (range(8), reversed(range(8))):
        intake = TaskIntake(task, population)
        for place in order:
            content = pack_update(
                update_of(task, partial, place), "arrow" if place % 2 else "safetensors"
            )
            assert intake.offer(content) == (Verdict.TAKEN, "")
            assert intake.offer(content)[0] is Verdict.DUPLICATE
        sums.append(intake.close().sum_delta)
    assert np.array_equal(*sums)
    assert np.abs(sums[0] - partial.sum_delta).max() < 1e-5


def test_poisoned_updates_are_refused_or_screened(opened: tuple[Any, Any, Any]) -> None:
    task, population, partial = opened
    intake = TaskIntake(dataclasses.replace(task, reject_above=10.0), population)
    good = pack_update(update_of(task, partial, 0))
    wrong = [
        pickle.dumps({"delta": 1}),
        b"",
        b"\xff\xff\xff\xffrubbish",
        b"\x00" * 40,
        good[:-7],
        b"x" * (10 * len(good) + (1 << 21)),
        pack_update(update_of(task, partial, 0, spec_id="another")),
        pack_update(update_of(task, partial, 0, client=10**9)),
        pack_update(update_of(task, partial, 0, n_samples=0)),
        pack_update(update_of(task, partial, 0, n_samples=10**9)),
        pack_update(update_of(task, partial, 0, delta=np.zeros((2, 2), np.float32))),
        pack_update(update_of(task, partial, 0, delta=np.zeros(4, np.int64))),
    ]
    for content in wrong:
        assert intake.offer(content)[0] is Verdict.REFUSED
    late = pack_update(update_of(task, partial, 0, round_id=7))
    assert intake.offer(late)[0] is Verdict.LATE
    for place, value in enumerate((np.nan, np.inf, 1e10)):
        delta = np.full_like(partial.updates[0], value)
        intake.offer(pack_update(update_of(task, partial, place, delta=delta)))
    intake.offer(pack_update(update_of(task, partial, 3), "arrow"))
    closed = intake.close()
    kinds = [Status.NONFINITE, Status.NONFINITE, Status.REJECTED, Status.OK]
    assert closed.status.tolist() == [*kinds, *[Status.FAILED] * 4]
    assert np.isfinite(closed.sum_delta).all()
    assert closed.sum_weight[0] == partial.n_samples[3]


class Adder:
    """Moves all weights by the client's number; client 2 breaks, client 3 sends another shape."""

    def fit(self, client: int, weights: Arrays, round_id: int) -> Fitted:
        if client == 2:
            raise OSError("no battery")
        if client == 3:
            return Fitted([np.zeros(1)], 1)
        return Fitted([part + client for part in weights], client + 1)


def make_adder() -> Adder:
    return Adder()


def test_programs_train_clients_and_may_fail() -> None:
    spec = ModelSpec(
        architecture=FromProgram(factory=f"{__name__}:make_adder", shapes=((2, 2), (3,)))
    )
    population = Population(offsets=np.arange(5), sample_ids=np.zeros(4, np.int32))
    job = FederatedJob(
        FedAvg(spec, LocalConfig(), 4), population, screen=ScreenConfig(min_fraction=0.5)
    )
    report = run_rounds(job, load_data(RECIPE.data, 1, None).samples(), 1)[0]
    assert (report.counts["ok"], report.counts["failed"]) == (2, 2)
    assert job.strategy.weights(0) == pytest.approx(np.full(7, 2 / 3))
    with pytest.raises(ConfigError, match="importable"):
        FromProgram(factory="no.such:thing", shapes=((1,),)).program()


def test_speakers_and_raters_are_natural_clients(tmp_path: Path) -> None:
    play = tmp_path / "play.txt"
    play.write_text("ROMEO:\n" + "abcab" * 30 + "\n\nA stage direction\n\nJULIET:\n" + "cba" * 40)
    data = load_shakespeare_data(play, context=3, min_characters=50, per_client=20)
    assert data.vocabulary == data.classes == 3
    assert len(np.unique(data.keys)) == 2
    recipe = FederatedConfig(partition=PartitionConfig(scheme="natural"), clients_per_round=2)
    assert make_population(recipe, data).n_clients == 2
    spec = ModelConfig(kind="context", dim=2, hidden=(4,)).spec(data)
    run_rounds(make_job(recipe, spec, make_population(recipe, data)), data.samples(), 1)
    with pytest.raises(ConfigError, match="bag or context"):
        ModelConfig().spec(data)
    with pytest.raises(DataError, match="no speaker"):
        load_shakespeare_data(play, min_characters=10**6)
    (tmp_path / "movies.csv").write_text("movieId,title,genres\n7,x,Comedy|Drama\n8,y,Drama\n")
    rows = "".join(f"{user},{7 + user % 2},{user % 5}.5,0\n" for user in range(20))
    (tmp_path / "ratings.csv").write_text(f"userId,movieId,rating,timestamp\n{rows}")
    films = load_movielens_data(tmp_path)
    assert films.vocabulary == 4
    assert films.classes == 0
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating\n1,99,3\n")
    with pytest.raises(DataError, match="row 2"):
        load_movielens_data(tmp_path)


def test_leaf_cifar_and_client_tables(tmp_path: Path) -> None:
    users = {"a": {"x": [[0.1, 0.2]] * 4, "y": [0, 1, 0, 1]}, "b": {"x": [[0.3, 0.4]], "y": [2]}}
    file = tmp_path / "leaf.json"
    file.write_text(json.dumps({"users": ["a", "b"], "num_samples": [4, 1], "user_data": users}))
    leaf = load_leaf_data(file)
    assert leaf.inputs.shape[1:] == (2,)
    text = {"users": ["u"], "user_data": {"u": {"x": ["abc", "bcd"] * 3, "y": ["d", "e"] * 3}}}
    file.write_text(json.dumps(text))
    assert load_leaf_data(file).vocabulary == 80
    file.write_text('{"users": ["a"]}')
    with pytest.raises(DataError, match="LEAF"):
        load_leaf_data(file)
    batch = {b"data": np.zeros((3, 3072), np.uint8), b"labels": [0, 1, 2]}
    for name in ("data_batch_1", "test_batch"):
        (tmp_path / name).write_bytes(pickle.dumps(batch, protocol=2))
    assert load_cifar_data(tmp_path).inputs.shape == (3, 3, 32, 32)
    (tmp_path / "test_batch").write_bytes(pickle.dumps(Path("/etc")))
    with pytest.raises(DataError, match="no place"):
        load_cifar_data(tmp_path)
    table = tmp_path / "clients.csv"
    table.write_text("client,index\nx,1\ny,0\n")
    assert load_client_csv(table, 2).tolist() == ["y", "x"]
    with pytest.raises(DataError, match="names 2 of 3"):
        load_client_csv(table, 3)
    with pytest.raises(CapabilityError):
        load_leaf_data(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="path"):
        DataConfig(name="leaf")


def test_learning_rates_decay_by_round() -> None:
    local = LocalConfig(lr=0.4, lr_decay=0.5, decay_every=2)
    assert [local.at_round(r).lr for r in range(5)] == [0.4, 0.4, 0.2, 0.2, 0.1]
    strategy = FedAvg(ModelSpec(architecture=Mlp()), local, 1)
    assert strategy.assign(3, np.array([0]))[0].local.lr == 0.2
