"""Auxo with lost, forged and broken records, merged cohorts, rivals, and rules that are refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from auxo_populations import (
    CLIENTS,
    CONFIG,
    LOCAL,
    PER_ROUND,
    SPEC,
    auxo_job,
    make_inner,
    population,
)

from raysys.errors import ConfigError
from raysys.federated.auxo.affinity import AffinityEntry, AffinityRecord
from raysys.federated.auxo.auxo import Auxo
from raysys.federated.auxo.baselines import Cfl, FlexCfl, Ifca, OnePass
from raysys.federated.auxo.config import published
from raysys.federated.auxo.grouped import GroupedLines, random_groups
from raysys.federated.auxo.planted import (
    PlantedConfig,
    plant,
    score_clients,
)
from raysys.federated.core.datasets import load_digits_data
from raysys.federated.core.engine import FederatedJob
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.messages import FeedbackSpec, ScreenConfig
from raysys.federated.core.model import Cnn, Mlp, ModelSpec
from raysys.federated.core.runner import run_round, run_rounds
from raysys.federated.core.scaffold import Scaffold


def test_a_merged_cohort_hands_over_its_clients() -> None:
    config = dataclasses.replace(CONFIG, merge_after=3)
    job, strategy = auxo_job(config)
    samples = population().data.samples()
    while not strategy.events:
        run_round(job, samples)
    small, big = strategy.tree.leaves
    strategy.forest.cohorts[small].small_rounds = 50
    strategy.forest.cohorts[small]._participants.clear()
    strategy.forest.cohorts[small]._participants.append(1.0)
    strategy.forest.maybe_merge(job.round_id, 0.0)
    assert strategy.tree.leaves == [big]
    assert strategy.events[-1]["event"] == "merged"
    run_rounds(job, samples, job.round_id + 2)
    copy_job, copy = auxo_job(config)
    copy_job.load(job.state())
    assert copy.tree.leaves == [big]


def test_half_of_a_group_cut_in_two_joins_its_other_half() -> None:
    job, strategy = auxo_job(dataclasses.replace(CONFIG, merge_after=3))
    run_round(job, population().data.samples())
    forest = strategy.forest
    children = strategy.tree.split(0, 3, 1)
    strategy.table.add_cohorts(3)
    for child, (first, second) in zip(children, ((1.0, 0.0), (0.0, 1.0), (0.1, 2.0))):
        line = forest.copy_of(forest.line(0))
        state = line.state()
        state["weights"] = np.array(state["weights"])
        state["weights"][:2] += np.array([first, second], dtype=np.float32)
        line.load(state)
        forest.add_cohort(child, line, 1)
        forest.cohorts[child]._participants.append(50.0)
    lost = forest.cohorts[children[2]]
    lost.small_rounds = 50
    lost._participants.clear()
    lost._participants.append(1.0)
    forest.maybe_merge(job.round_id, 0.0)
    assert strategy.events[-1]["event"] == "merged"
    assert (strategy.events[-1]["cohort"], strategy.events[-1]["into"]) == (
        children[2],
        children[1],
    )


def test_lost_and_forged_records_do_not_break_a_job() -> None:
    job, strategy = auxo_job()
    samples = population().data.samples()
    run_rounds(job, samples, 30)
    rng = np.random.default_rng(0)
    forgers = np.arange(8)
    for _ in range(25):
        strategy.table.forget(rng.choice(CLIENTS, CLIENTS // 5, replace=False))
        for client in forgers.tolist():
            wrong = strategy.tree.leaves[int(rng.integers(len(strategy.tree.leaves)))]
            entry = AffinityEntry(cohort=wrong, reward=1.0, label=0, tried=True)
            strategy.check_in(client, AffinityRecord(entries=(entry,)), job.round_id)
        run_round(job, samples)
    assert len(strategy.tree.leaves) == 2
    honest = np.arange(8, CLIENTS)
    known = honest[strategy.table.rewards(honest).max(axis=1) > 0]
    leaves = strategy.best_leaves(known)
    pairs = {(int(a), int(b)) for a, b in zip(leaves, population().group_of[known])}
    counts = [((leaves == a) & (population().group_of[known] == b)).sum() for a, b in sorted(pairs)]
    assert max(counts) + sorted(counts)[-2] > 0.9 * len(known)


def test_local_noise_leaves_out_the_halves() -> None:
    strategy = Auxo(CONFIG, PER_ROUND, make_inner)
    screen = ScreenConfig(clip_norm=1.0, local_noise=0.01)
    job = FederatedJob(strategy, population().population, 3, screen=screen)
    reports = run_rounds(job, population().data.samples(), 12)
    assert reports[-1].table.sketch is not None
    assert reports[-1].table.sketch_half is None


def test_broken_clients_and_placing_records() -> None:
    job, strategy = auxo_job()
    data = population().data
    samples = data.samples()
    inputs = samples.inputs.clone()
    inputs[population().population.samples(3).astype(np.int64)] = float("nan")
    broken = dataclasses.replace(samples, inputs=inputs)
    run_rounds(job, broken, 12)
    assert np.isfinite(strategy.weights(0)).all()
    run_rounds(job, samples, 40)
    leaf = strategy.tree.leaves[1]
    entry = AffinityEntry(cohort=leaf, reward=0.4)
    assert strategy.place(AffinityRecord(entries=(entry,))) == leaf
    parent = AffinityEntry(cohort=0, reward=0.4, label=1)
    assert strategy.place(AffinityRecord(entries=(parent,))) == strategy.tree.nodes[0].children[1]
    assert strategy.place(AffinityRecord(), client=9) in strategy.tree.leaves


def test_published_rules_run_and_scaffold_is_refused() -> None:
    job, strategy = auxo_job(published(start_round=2, sketch_dim=64, agree_min=0.7))
    run_rounds(job, population().data.samples(), 25)
    assert strategy.feedback_spec().halves is False
    with pytest.raises(ConfigError, match="SCAFFOLD"):
        Auxo(CONFIG, PER_ROUND, lambda: Scaffold(SPEC, LOCAL, PER_ROUND))
    with pytest.raises(ConfigError, match="state"):
        strategy.load({})
    with pytest.raises(ConfigError, match="started"):
        Auxo(CONFIG, PER_ROUND, make_inner).table.known(np.array([0]))


def test_rivals_train_and_resume() -> None:
    planted = population()
    samples = planted.data.samples()

    def probe(weights: np.ndarray, clients: np.ndarray) -> np.ndarray:
        right = planted.group_of[clients]
        return np.abs(np.arange(len(weights))[None, :] - right[:, None]).astype(float)

    strategies = {
        "oracle": (lambda: GroupedLines(2, PER_ROUND, make_inner, planted.group_of), 1.0),
        "ifca": (lambda: Ifca(2, PER_ROUND, make_inner, probe), 0.7),
        "cfl": (lambda: Cfl(CLIENTS, lambda: FedAvg(SPEC, LOCAL, CLIENTS)), None),
        "fl+hc": (lambda: OnePass(2, PER_ROUND, make_inner, 4), 0.5),
        "flexcfl": (lambda: FlexCfl(2, PER_ROUND, make_inner), None),
        "random": (
            lambda: GroupedLines(2, PER_ROUND, make_inner, random_groups(CLIENTS, 2, 0)),
            None,
        ),
    }
    for name, (make, least) in strategies.items():
        strategy = make()
        job = FederatedJob(strategy, planted.population, 1)
        run_rounds(job, samples, 8)
        row = strategy.groups(np.arange(CLIENTS))
        found = score_clients(planted, SPEC, strategy.stacked(), row, np.arange(CLIENTS))
        assert found.worst <= found.mean <= found.best
        if least is not None:
            assert found.ari >= least, name
        copy = make()
        again = FederatedJob(copy, planted.population, 1)
        again.load(job.state())
        run_rounds(job, samples, 9)
        run_rounds(again, samples, 9)
        assert np.array_equal(copy.stacked(), strategy.stacked()), name


def test_first_halves_are_the_same_on_every_rung() -> None:
    planted = population()
    for architecture, rungs in (
        (Mlp(sizes=(64, 8, 10)), ("batched", "vmap", "loop")),
        (Cnn(channels=(4,)), ("vmap", "loop")),
    ):
        sketches = []
        for rung in rungs:
            line = FedAvg(ModelSpec(architecture=architecture), LOCAL, 12)
            line._feedback = FeedbackSpec(sketch_dim=16, halves=True)
            job = FederatedJob(line, planted.population, 0)
            job.execution = dataclasses.replace(job.execution, rung=rung)
            table = run_round(job, planted.data.samples()).table
            assert table.sketch is not None
            assert table.sketch_half is not None
            assert 0 < np.abs(table.sketch_half).sum() < 2 * np.abs(table.sketch).sum()
            sketches.append(table.sketch_half[np.argsort(table.clients)])
        for other in sketches[1:]:
            assert np.allclose(sketches[0], other, atol=1e-5)


def test_planted_populations_are_what_they_say() -> None:
    shares = PlantedConfig(groups=3, shares=(0.7, 0.2, 0.1), clients=100, samples=10)
    planted = plant(load_digits_data(0, image=True), shares, 4)
    assert np.bincount(planted.group_of).tolist() == [70, 20, 10]
    turned = population(4, "rotation")
    assert np.array_equal(np.rot90(turned.test_inputs[0], axes=(2, 3)), turned.test_inputs[1])
    with pytest.raises(ConfigError, match="groups"):
        PlantedConfig(kind="inversion", groups=3)
    with pytest.raises(ConfigError, match="shares"):
        PlantedConfig(groups=2, shares=(1.0,))
