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

from raysys import machine

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]
PROBE = Path(__file__).with_name("andes_engine_probe.py")


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: run `make setup`")
    folder = tmp_path_factory.mktemp("andes")
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
    return facts


def test_greedy_tokens_do_not_depend_on_pauses(facts: dict[str, Any]) -> None:
    policies = facts["policies"]
    assert policies["pauses_fcfs"] == 0
    assert policies["pauses_andes"] >= 10  # otherwise nothing was tested
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
