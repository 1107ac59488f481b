"""The scheduler adapter inside a real vLLM engine with a small random model (one start for all).

``andes_engine_probe.py`` does the work in a process of its own, because vLLM changes its process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.calibrate import read_step_log
from raysys import machine
from raysys.serving.andes.models import fit_step_time
from raysys.serving.andes.routing import load_from_dict

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]
PROBE = Path(__file__).with_name("andes_engine_probe.py")


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: run `make setup`")
    folder = tmp_path_factory.mktemp("andes")
    log = folder / "steps.jsonl"
    result = folder / "facts.json"
    root = str(machine.app_root())
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, str(PROBE), str(folder / "model"), str(result)],
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    facts: dict[str, Any] = json.loads(result.read_text())
    return facts | {"steps": read_step_log(log)}


def test_greedy_tokens_do_not_depend_on_pauses(facts: dict[str, Any]) -> None:
    policies = facts["policies"]
    assert policies["pauses_fcfs"] == 0
    assert policies["pauses_andes"] > 0  # otherwise nothing was tested
    assert policies["equal"]
    assert policies["distinct"] > 1  # the random model does not say one thing only


def test_planning_works_and_leaves_nothing(facts: dict[str, Any]) -> None:
    policies = facts["policies"]
    assert policies["faults"] == 0
    assert policies["left_slots"] == 0
    assert policies["free_after"] == policies["capacity"]
    assert policies["steps"] > 100


def test_the_status_is_complete(facts: dict[str, Any]) -> None:
    status = facts["policies"]["status"]
    assert status["policy"] == "andes"
    assert status["running"] == status["waiting"] == 0
    assert status["kv_use"] == 0.0
    assert status["plan_ms_p99"] >= status["plan_ms_p50"] > 0.0
    assert set(status["step_time"]) >= {"base_s", "per_prefill_token_s"}


def test_preemptions_and_planning_time_are_told_by_tenant(facts: dict[str, Any]) -> None:
    tenants = facts["policies"]["status"]["tenants"]
    assert set(tenants) == {"odd", "even"}
    assert sum(one["preemptions"] for one in tenants.values()) >= facts["policies"]["pauses_andes"]
    assert all(one["plan_s"] > 0.0 and one["live"] == 0 for one in tenants.values())


def test_the_load_that_a_router_sees_is_one(facts: dict[str, Any]) -> None:
    load = load_from_dict(facts["policies"]["status"]["load"])
    assert load is not None
    assert (load.readers, load.demand_tds) == (0, 0.0)
    assert load.speed() > 0.0


def test_every_step_is_in_the_log(facts: dict[str, Any]) -> None:
    steps = facts["steps"]
    assert len(steps) >= facts["policies"]["steps"]
    assert (steps[:, 0] >= 1).all()  # nobody computes nothing
    assert (steps[:, 3] > 0.0).all()
    assert steps[:, 1].max() > 24  # prompts are there
    assert fit_step_time(*steps.T)[0].base_s > 0.0


def test_ten_thousand_requests_may_wait(facts: dict[str, Any]) -> None:
    queue = facts["long_queue"]
    assert queue["waiting"] > 9_000
    assert queue["finished"] > 0
    assert queue["plans"] > 0
    assert queue["faults"] == 0
    assert queue["plan_ms"] < 500.0
    assert queue["left_slots"] == 0
    assert queue["free"] == queue["capacity"]


def test_clients_that_leave_give_their_blocks_back(facts: dict[str, Any]) -> None:
    aborts = facts["aborts"]
    assert {"RUNNING", "PREEMPTED"} <= set(aborts["states"])
    assert aborts["left"] == aborts["left_slots"] == 0
    assert aborts["free"] == aborts["capacity"]


def test_unusable_targets_are_counted_and_served_with_the_default(facts: dict[str, Any]) -> None:
    assert facts["bad_targets"] == {"counted": 1, "tokens": 2}


def test_a_bug_in_planning_falls_back_to_order_of_arrival(facts: dict[str, Any]) -> None:
    assert facts["failing_plan"]["faults"] > 0
    assert facts["failing_plan"]["lengths"] == [56] * 4


def test_another_engine_is_refused_with_the_tested_version(facts: dict[str, Any]) -> None:
    guard = facts["guard"]
    assert guard["as tested"] == "accepted"
    assert "vLLM 0.32.0" in guard["other version"]
    assert "vLLM 0.29.0 only" in guard["other version"]
    assert guard["other version, forced"] == "accepted"
    assert "_preempt_request" in guard["changed method"]
