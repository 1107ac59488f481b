"""The Auxo strategy on small planted populations of digits: splits, restraint, resume."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest

from raysys.errors import ConfigError
from raysys.federated.auxo.affinity import AffinityEntry, AffinityRecord
from raysys.federated.auxo.auxo import STRIDE, Auxo
from raysys.federated.auxo.baselines import Cfl, FlexCfl, Ifca, OnePass
from raysys.federated.auxo.cohort import Cohort, SplitReport
from raysys.federated.auxo.config import AuxoConfig, published
from raysys.federated.auxo.grouped import GroupedLines, random_groups
from raysys.federated.auxo.planted import (
    Planted,
    PlantedConfig,
    drift,
    plant,
    score_clients,
)
from raysys.federated.core.datasets import load_digits_data
from raysys.federated.core.engine import FederatedJob
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.messages import FeedbackSpec, ScreenConfig
from raysys.federated.core.model import Cnn, Mlp, ModelSpec
from raysys.federated.core.population import Population
from raysys.federated.core.runner import run_round, run_rounds
from raysys.federated.core.scaffold import Scaffold
from raysys.federated.core.serialize import pack_arrays, unpack_arrays
from raysys.federated.core.server import Yogi
from raysys.federated.fed_ensemble.ensemble import EnsembleConfig, FedEnsemble

SPEC = ModelSpec(architecture=Mlp(sizes=(64, 16, 10)))
LOCAL = LocalConfig(batch_size=10, lr=0.1)
CLIENTS, PER_ROUND = 160, 40
CONFIG = AuxoConfig(k_max=4, start_round=2, sketch_dim=64)


@functools.lru_cache
def population(groups: int = 2, kind: str = "labels", alpha: float = 20.0) -> Planted:
    config = PlantedConfig(kind=kind, groups=groups, clients=CLIENTS, samples=30, alpha=alpha)
    return plant(load_digits_data(0, image=True), config, 0)


def make_inner() -> FedAvg:
    return FedAvg(SPEC, LOCAL, PER_ROUND)


def auxo_job(
    config: AuxoConfig = CONFIG, planted: Planted | None = None, make: object = make_inner
) -> tuple[FederatedJob, Auxo]:
    strategy = Auxo(config, PER_ROUND, make)  # type: ignore[arg-type]
    return FederatedJob(strategy, (planted or population()).population, 3), strategy


def split_round(strategy: Auxo) -> int:
    return next(e["round"] for e in strategy.events if e["event"] == "split")


def quality(strategy: Auxo, planted: Planted) -> float:
    leaves = np.array(strategy.tree.leaves)
    models = np.stack([strategy.weights(int(leaf) * STRIDE) for leaf in leaves])
    clients = np.arange(CLIENTS)
    row = np.searchsorted(leaves, strategy.best_leaves(clients))
    return score_clients(planted, SPEC, models, row, clients).ari


def test_two_groups_are_found_and_explained() -> None:
    job, strategy = auxo_job()
    reports = run_rounds(job, population().data.samples(), 50)
    assert len(strategy.tree.leaves) == 2
    assert quality(strategy, population()) > 0.9
    event = next(e for e in strategy.events if e["event"] == "split")
    assert event["evidence"]["parts"] == 2
    assert event["evidence"]["agreement"] >= CONFIG.agree_min
    assert event["evidence"]["stability"]["2"] >= CONFIG.stab_min
    leaf = strategy.tree.leaves[0]
    found = strategy.explain_split(leaf)
    assert found is not None
    assert not found.go
    assert sum(strategy.membership(5).values()) == pytest.approx(1)
    assert strategy.predict_plan(5)[0][0] // STRIDE in strategy.tree.leaves
    # No device works more than in FedAvg, and none downloads more than one model.
    plain = FederatedJob(make_inner(), population().population, 3)
    other = run_rounds(plain, population().data.samples(), 50)
    assert sum(r.bytes_down for r in reports) == sum(r.bytes_down for r in other)
    assert sum(r.macs for r in reports) == sum(r.macs for r in other)


def test_before_the_first_split_it_is_fedavg_to_the_bit() -> None:
    job, strategy = auxo_job(dataclasses.replace(CONFIG, max_leaves=1))
    plain = FederatedJob(make_inner(), population().population, 3)
    run_rounds(job, population().data.samples(), 6)
    run_rounds(plain, population().data.samples(), 6)
    assert np.array_equal(strategy.weights(0), plain.strategy.weights(0))


def test_one_skewed_group_stays_one() -> None:
    lonely = population(groups=1, alpha=0.1)
    job, strategy = auxo_job(planted=lonely)
    run_rounds(job, lonely.data.samples(), 60)
    assert strategy.tree.leaves == [0]
    found = strategy.explain_split(0)
    assert found is not None
    assert found.verdict != "split"


@pytest.mark.parametrize("after", [0, 1])
def test_resume_around_a_split_gives_the_same_tree(after: int) -> None:
    job, strategy = auxo_job()
    samples = population().data.samples()
    while not strategy.events:
        run_round(job, samples)
    run_rounds(job, samples, job.round_id + after)
    saved = unpack_arrays(pack_arrays(job.state()))
    run_rounds(job, samples, job.round_id + 4)
    again, restored = auxo_job()
    again.load(saved)
    run_rounds(again, samples, job.round_id)
    left, right = job.state(), again.state()
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert np.array_equal(value, right[name], equal_nan=True), name
    assert restored.tree.nodes == strategy.tree.nodes


def test_devices_can_come_one_by_one() -> None:
    batch_job, batch = auxo_job()
    run_rounds(batch_job, population().data.samples(), 40)
    single = auxo_job()[1]
    single.load(batch.state())
    clients = np.arange(0, CLIENTS, 4)
    for strategy in (batch, single):
        strategy.demand(40)
    together = {int(c): part.model_id for part in batch.assign(40, clients) for c in part.clients}
    one_by_one = {
        int(c): part.model_id
        for client in batch._shuffled(40, clients)
        for part in single.assign(40, np.array([client]))
        for c in part.clients
    }
    assert together == one_by_one


def test_drifted_clients_find_their_new_cohort() -> None:
    job, strategy = auxo_job()
    samples = population().data.samples()
    run_rounds(job, samples, 40)
    moved_population, group_of, moved = drift(population(), 0.1, 0)
    job.population = moved_population
    run_rounds(job, samples, 75)
    clients = np.arange(CLIENTS)
    leaves = strategy.best_leaves(clients)
    majority = {
        leaf: np.bincount(group_of[leaves == leaf]).argmax() for leaf in strategy.tree.leaves
    }
    right = np.array([majority[leaf] for leaf in leaves.tolist()]) == group_of
    assert right[moved].mean() > 0.8
    assert right.mean() > 0.9


def test_an_ensemble_lives_in_every_cohort() -> None:
    def make() -> FedEnsemble:
        return FedEnsemble(EnsembleConfig(k=2), PER_ROUND, make_inner)

    job, strategy = auxo_job(dataclasses.replace(CONFIG, p_min=8), make=make)
    run_rounds(job, population().data.samples(), 70)
    assert len(strategy.tree.leaves) == 2
    plan = strategy.predict_plan(7)
    assert len(plan) == 2
    assert len({model // STRIDE for model, _ in plan}) == 1
    again, restored = auxo_job(dataclasses.replace(CONFIG, p_min=8), make=make)
    again.load(job.state())
    assert np.array_equal(restored.weights(plan[1][0]), strategy.weights(plan[1][0]))


def test_whom_a_cohort_has_accepted_stays_there_and_a_few_odd_ones_gather_nowhere() -> None:
    job, strategy = auxo_job(dataclasses.replace(CONFIG, eps_0=0.0))
    samples = population().data.samples()
    run_rounds(job, samples, 30)
    home, other = strategy.tree.leaves
    clients = np.arange(10)
    rewards = np.zeros((10, len(strategy.tree.nodes)))
    rewards[:, home], rewards[:, other] = 0.02, -0.01
    strategy.table.set_rewards(clients, rewards, 30)
    strategy.demand(30)
    strategy._quotas.places[home] = 0  # full: the other cohort is near, but has not accepted them
    strategy._quotas.offers = 1000
    assert strategy.assign(30, clients) == []
    # Homeless in both: a few of them go on looking, as many as a part needs gather.
    rewards[:, home] = -1.0
    everybody = np.arange(CLIENTS)
    for lost, gathers in ((2, False), (10, True)):
        strategy.table.set_rewards(everybody, np.full((CLIENTS, rewards.shape[1]), 0.2), 30)
        strategy.table.note_placement(clients, 30)
        strategy.table.exhaust(clients, 2)
        strategy.table.set_rewards(clients[:lost], rewards[:lost], 30)
        strategy.demand(30)
        assert strategy.forest.gathers is gathers


def by_group(planted: Planted) -> Planted:
    """The same clients, numbered group after group."""
    order = np.argsort(planted.group_of, kind="stable")
    ids = planted.population.sample_ids.reshape(CLIENTS, -1)[order].reshape(-1)
    people = dataclasses.replace(planted.population, sample_ids=ids)
    return dataclasses.replace(planted, population=people, group_of=planted.group_of[order])


def some_clients(planted: Planted, count: int) -> Population:
    """The first clients alone."""
    offsets = planted.population.offsets[: count + 1]
    ids = planted.population.sample_ids[: offsets[-1]]
    return dataclasses.replace(planted.population, offsets=offsets, sample_ids=ids)


def test_a_cohort_whose_members_leave_is_merged_and_newcomers_may_join_later() -> None:
    planted = by_group(population())
    samples = planted.data.samples()
    first = int((planted.group_of == 0).sum())
    early = dataclasses.replace(planted, population=some_clients(planted, CLIENTS - 20))
    job, strategy = auxo_job(dataclasses.replace(CONFIG, merge_after=4), early)
    run_rounds(job, samples, 30)
    assert len(strategy.tree.leaves) == 2
    job.population = planted.population  # twenty more than the job began with
    run_rounds(job, samples, 40)
    late = np.arange(CLIENTS - 20, CLIENTS)
    assert strategy.table.known(late).any()
    job.population = some_clients(planted, first)  # the second group has gone
    run_rounds(job, samples, 62)
    assert len(strategy.tree.leaves) == 1
    assert strategy.events[-1]["event"] == "merged"
    copy_job, copy = auxo_job(dataclasses.replace(CONFIG, merge_after=4), early)
    copy_job.load(job.state())
    assert np.array_equal(copy.table.known(late), strategy.table.known(late))


def test_a_population_of_one_is_refused_and_a_record_sent_twice_counts_once() -> None:
    planted = population()
    alone = dataclasses.replace(planted, population=some_clients(planted, 1))
    with pytest.raises(ConfigError, match="at most the population of 1"):
        auxo_job(planted=alone)  # a cohort needs two clients a round at least
    job, strategy = auxo_job()
    run_rounds(job, planted.data.samples(), 4)
    client = int(strategy.table.clients[0])
    strategy.check_in(client, strategy.table.record(client), 4)
    before = {name: value.copy() for name, value in strategy.table.state().items()}
    assert strategy.check_in(client, strategy.table.record(client), 4)
    for name, value in strategy.table.state().items():
        assert np.array_equal(value, before[name]), name


def test_two_cohorts_that_would_split_at_once_keep_to_the_most_cohorts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job, strategy = auxo_job(
        dataclasses.replace(CONFIG, max_leaves=3),
        make=lambda: FedAvg(SPEC, LOCAL, PER_ROUND, Yogi()),
    )
    samples = population().data.samples()
    while not strategy.events:
        run_round(job, samples)
    for leaf in strategy.tree.leaves:
        strategy.forest.cohorts[leaf].parts = 2

    def eager(cohort: Cohort, report: SplitReport, leaves: int) -> str:
        return "too many" if leaves + 2 - 1 > 3 or cohort.parts != 2 else "split"

    monkeypatch.setattr(Cohort, "_most_stable", lambda cohort: 2)
    monkeypatch.setattr(Cohort, "_verdict", eager)
    run_rounds(job, samples, job.round_id + 2)
    assert len(strategy.tree.leaves) == 3
    # Brothers start from the same optimiser, and each has its own from then on.
    inner = next(node.children for node in strategy.tree.nodes[1:] if node.children)
    left, right = (strategy.forest.line(child).state() for child in inner)
    run_rounds(job, samples, job.round_id + 2)
    later = strategy.forest.line(inner[0]).state()
    assert left.keys() == right.keys()
    assert any(not np.array_equal(left[name], later[name]) for name in left)


def test_cohorts_serve_another_job_and_freeze() -> None:
    job, strategy = auxo_job()
    samples = population().data.samples()
    run_rounds(job, samples, 40)
    cohorts = strategy.export_cohorts()
    other_job, other = auxo_job(make=lambda: FedAvg(SPEC, LOCAL, PER_ROUND, Yogi()))
    other.import_cohorts(cohorts)
    other.freeze()
    run_rounds(other_job, samples, 5)
    assert other.tree.leaves == strategy.tree.leaves
    assert not other.events
    a, b = (other.weights(leaf * STRIDE) for leaf in other.tree.leaves)
    assert not np.array_equal(a, b)


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
