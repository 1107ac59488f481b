"""The Auxo strategy on small planted populations of digits: splits, restraint, resume."""

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
    by_group,
    make_inner,
    population,
    quality,
    some_clients,
)

from raysys.errors import ConfigError
from raysys.federated.auxo.auxo import STRIDE
from raysys.federated.auxo.cohort import Cohort, SplitReport
from raysys.federated.auxo.explain import explain
from raysys.federated.auxo.planted import (
    drift,
)
from raysys.federated.core.engine import FederatedJob
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.runner import run_round, run_rounds
from raysys.federated.core.serialize import pack_arrays, unpack_arrays
from raysys.federated.core.server import Yogi
from raysys.federated.fed_ensemble.ensemble import EnsembleConfig, FedEnsemble


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
    known = explain(strategy)
    run_rounds(job, samples, job.round_id + 4)
    again, restored = auxo_job()
    again.load(saved)
    assert explain(restored) == known  # also before the next decision, or with none to come
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

    monkeypatch.setattr(Cohort, "_most_stable", lambda cohort, round_id: 2)
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
