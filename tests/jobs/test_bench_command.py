"""The benchmark command: a claim that fails costs no other, and standard output is JSON alone."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs.bench import __main__ as bench
from raysys.bench import Claim, Profile
from raysys.errors import CapabilityError, RemoteError


def good(profile: Profile) -> Claim:
    os.write(1, b"an engine's banner\n")
    print("a library's message")
    return Claim(name="good", value=2.0, unit="times", better="higher")


def lost(profile: Profile) -> Claim:
    raise RemoteError("job 1", "the node is gone")


def broken(profile: Profile) -> Claim:
    raise ZeroDivisionError("a defect")


def absent(profile: Profile) -> Claim:
    raise CapabilityError("a GPU", "none here", "Use a machine with one")


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> None:
    claims = {"lost": lost, "broken": broken, "absent": absent, "good": good}
    module = SimpleNamespace(CLAIMS=claims, CONFIG={"n": 1})
    monkeypatch.setitem(sys.modules, "jobs.bench.demo", module)
    monkeypatch.setattr(bench, "systems", lambda: ["demo"])


def test_a_failed_claim_is_noted_and_the_others_are_measured(
    demo: None, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert bench.main(["demo", "--json", "-"]) == RemoteError.exit_code
    out, err = capfd.readouterr()
    result = json.loads(out)
    assert [claim["name"] for claim in result["claims"]] == ["good"]
    config = result["config"]
    assert config["n"] == 1
    assert set(config["seconds"]) == {"lost", "broken", "absent", "good"}
    assert set(config["failed"]) == {"lost", "broken"}
    assert set(config["skipped"]) == {"absent"}
    assert "the node is gone" in config["failed"]["lost"]
    assert "banner" in err
    assert "library's message" in err
    assert "Traceback" in err
    path = tmp_path / "one.json"
    assert bench.main(["demo", "--only", "good", "--json", str(path)]) == 0
    assert json.loads(path.read_text())["claims"][0]["value"] == 2.0


def test_all_systems_have_processes_of_their_own_and_one_may_die(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    good = "import sys; open(sys.argv[1], 'w').write('{\"system\": \"a\"}'); print('noise')"
    programs = {"a": good, "b": "import os; os.kill(os.getpid(), 9)", "c": good}
    monkeypatch.setattr(bench, "systems", lambda: list(programs))
    monkeypatch.setattr(
        bench, "_command", lambda name, _, path: [sys.executable, "-c", programs[name], str(path)]
    )
    assert bench.main(["all", "--json", "-"]) == -9
    first, second, third = json.loads(capfd.readouterr().out)
    assert first == third == {"system": "a"}
    assert second["system"] == "b"
    assert second["claims"] == []
    assert "code -9" in second["config"]["failed"]["all claims"]


def test_an_unknown_claim_or_system_is_named(demo: None, capfd: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["demo", "--only", "best", "--json", "-"]) == 2
    assert bench.main(["other"]) == 2
    assert bench.main(["all", "--only", "good"]) == 2
    err = capfd.readouterr().err
    assert "one of lost, broken" in err
    assert "Name one system" in err
