"""The fault benchmark's own parts: drawn blows, books, process trees, and a small program shot."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.bench import faults
from jobs.bench.faults import processes
from jobs.bench.faults.endpoint import outcomes
from jobs.bench.faults.plan import Blow, Tally, draw_blows
from jobs.bench.faults.program import Program, newer_file, shoot
from raysys.errors import ConfigError

SLEEPER = "import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
INNER = "import time; print('up', flush=True); time.sleep(600)  # the-sleeper"


def test_every_system_has_a_claim() -> None:
    assert set(faults.CLAIMS) == {
        "andes", "lte", "kgt", "ccs", "fiited", "venn", "auxo", "fedtrans", "fed_ensemble",
        "swan", "federated",
    }  # fmt: skip


def test_blows_come_from_the_seed_and_meet_every_kind() -> None:
    kinds = ("driver", "worker", "coordinator")
    blows = draw_blows(3, "federated", kinds, 7)
    assert blows == draw_blows(3, "federated", kinds, 7)
    assert blows != draw_blows(4, "federated", kinds, 7)
    assert blows != draw_blows(3, "auxo", kinds, 7)
    assert {blow.victim for blow in blows[:3]} == set(kinds)
    assert all(0 <= blow.moment < 1 for blow in blows)
    with pytest.raises(ConfigError, match="victims"):
        draw_blows(3, "federated", (), 1)
    with pytest.raises(ConfigError, match="moment"):
        Blow(victim="driver", moment=1.0)


def test_a_run_that_nothing_hit_is_no_evidence() -> None:
    tally = Tally()
    tally.trials.append({"kills": {}, "held": True})
    assert tally.held() == 0.0
    tally.trials.append({"kills": {"driver": 1}, "held": True})
    tally.trials.append({"kills": {"worker": 1}, "held": False})
    tally.kills["driver"] += 1
    tally.late["driver"] += 1
    claim = tally.claim("x", "nothing is lost", 5)
    assert claim.value == 0.5
    assert claim.samples["kills_in_all"] == 1
    assert claim.samples["late"] == {"driver": 1}


def test_a_stream_that_is_not_there_is_lost() -> None:
    assert outcomes([], 3) == {"answered": 0, "failed": 0, "lost": 3}


def test_descendants_are_found_by_title_and_killed() -> None:
    code = SLEEPER.format(inner=INNER)
    root = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert root.stdout is not None
        assert root.stdout.readline() == b"up\n"
        titles = processes.tree(root.pid)
        assert len(titles) == 2
        assert processes.kill_one(root.pid, "the-sleeper", random.Random(0), patience_s=60.0)
        assert root.wait(60) == 0  # the root itself was not hit, although its title matches
        assert processes.tree(root.pid) == {}
        assert not processes.kill_one(root.pid, "the-sleeper", random.Random(0), patience_s=60.0)
        assert processes.wait_gone(list(titles), patience_s=60.0) == 0
        assert not processes.kill(root.pid)
    finally:
        root.kill()
        root.communicate()


def test_a_program_that_fails_undisturbed_is_a_failed_claim(tmp_path: Path) -> None:
    program = Program(
        system="none", words=("jobs.bench", "nosuch"), settings=lambda folder: (), victims={},
        sign=newer_file("*"), digest=lambda folder: "",
    )  # fmt: skip
    tally = shoot(program, tmp_path, seed=1, trials=1, each=1)
    assert tally.held() == 0.0
    assert "exit code 2" in tally.trials[0]["undisturbed"]


def test_only_files_after_the_start_are_signs_of_work(tmp_path: Path) -> None:
    seen = newer_file("checkpoints/*")
    assert not seen(tmp_path, 0, 0.0)
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / "1"
    path.touch()
    written_s = path.stat().st_mtime
    assert seen(tmp_path, 0, written_s - 1.0)
    assert not seen(tmp_path, 0, written_s + 1.0)
