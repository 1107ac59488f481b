"""The Andes benchmark's own machinery, on small cases; the claims themselves run elsewhere."""

import math

import numpy as np
import pytest

from jobs.bench import andes
from jobs.bench.andes import planning, simulated
from jobs.bench.andes.cases import (
    ABLATIONS,
    MACHINES,
    Case,
    Simulations,
    crossing,
    make_policy,
    make_workload,
    run_case,
)
from raysys.bench import Profile
from raysys.errors import ConfigError
from raysys.serving.andes.options import PlannerConfig


def test_crossing_of_a_known_curve():
    rate, points = crossing(lambda x: 1.2 - 0.2 * x, 1.0, 1.1, 0.9, rounds=2)
    assert rate == pytest.approx(1.5, abs=1e-3)
    assert len(points) < 10
    rate, _ = crossing(lambda x: math.exp(-x), 3.0, 4.0, 0.9, rounds=6)
    assert rate == pytest.approx(-math.log(0.9), abs=0.01)


def test_a_case_is_simulated_once_and_reports_what_claims_need():
    case = Case(load="cyclic", rate=0.5, seed=1, duration_s=60.0)
    rows = Simulations().run([case, case])
    assert rows[0] is rows[1]
    wanted = {"mean_qoe", "p10_qoe", "throughput", "preemptions_per_request", "plan_share"}
    assert wanted <= set(rows[0])
    prefill_first = run_case(Case(load="cyclic", rate=0.5, seed=1, duration_s=60.0,
                                  policy="fcfs_prefill_first"))  # fmt: skip
    assert 0.0 <= prefill_first["mean_qoe"] <= 1.0


@pytest.mark.parametrize("load", ["poisson", "cyclic", "random", "azure"])
def test_every_load_of_the_suite_has_requests(load):
    rate = 0.1 if load == "azure" else 1.0
    workload = make_workload(Case(load=load, rate=rate, seed=1, duration_s=120.0))
    assert workload.size > 20
    assert (np.diff(workload.arrival_s) >= 0).all()


def test_cases_name_what_exists():
    with pytest.raises(ConfigError, match="load"):
        make_workload(Case(load="tides", rate=1.0, seed=1))
    assert {PlannerConfig(**options) for options in ABLATIONS.values()}
    assert make_policy(Case(load="poisson", rate=1.0, seed=1, policy="round_robin")).name
    assert {case.machine for case in simulated.harm_cases(Profile())} == set(MACHINES)


def test_packing_claim_runs():
    claim = planning.dp_gap(Profile())
    assert 0.0 <= claim.value < claim.baseline.value
    assert set(andes.CLAIMS) >= {"qoe_cyclic_1p4", "do_no_harm", "azure_conversation"}


def test_crowded_table_is_crowded():
    table, slots, capacity = planning.overloaded_table(200, 1)
    running = table.running[slots]
    assert 10 < running.sum() < 190
    assert table.context_tokens[slots][running].sum() <= capacity
