"""The audit: what it makes of the advisory service's answers, and above all of none."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import re
import sys
import tomllib
from email.message import Message

import pytest

from raysys import machine
from raysys.cli import audit
from raysys.errors import CapabilityError, RemoteError

ROOT = machine.app_root()


def answer(*packages: dict[str, object]) -> list[str]:
    """A command that prints an answer as pip-audit does."""
    text = json.dumps({"dependencies": packages, "fixes": []})
    return [sys.executable, "-c", f"print({text!r})"]


CLEAN: dict[str, object] = {"name": "a", "version": "1", "vulns": []}
UNKNOWN: dict[str, object] = {"name": "b", "skip_reason": "Dependency not found on PyPI"}


def test_findings_are_told() -> None:
    bad = {"name": "c", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
    found = audit.advisories(answer(CLEAN, UNKNOWN, bad))
    assert (found.checked, list(found.skipped)) == (2, ["b"])
    assert list(found.findings) == ["c 2: CVE-1, mended in 3"]


@pytest.mark.parametrize(
    "command",
    [
        answer(UNKNOWN),
        [sys.executable, "-c", "import sys; sys.exit('ConnectionError: no route')"],
        [sys.executable, "-c", "print('[]')"],
    ],
)
def test_no_answer_is_no_good_news(command: list[str]) -> None:
    with pytest.raises(RemoteError, match="NOTHING was audited"):
        audit.advisories(command)


def test_a_missing_tool_is_named() -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('No module named pip_audit')"]
    with pytest.raises(CapabilityError, match=r"raysys\[audit\]"):
        audit.advisories(command)


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(audit, "licences", lambda: {"a": "MIT", "b": "AGPL-3.0"})
    found = audit.Audit(checked=2, skipped=[], findings=[])
    monkeypatch.setattr(audit, "advisories", lambda: found)
    assert audit.main([]) == 0
    assert "to look at: b" in capsys.readouterr().out
    found = audit.Audit(checked=2, skipped=[], findings=["a 1: CVE-1"])
    assert audit.main([]) == 1

    def silent() -> audit.Audit:
        raise RemoteError("advisory service", "NOTHING was audited", "Run it elsewhere")

    monkeypatch.setattr(audit, "advisories", silent)
    assert audit.main([]) == 5
    assert audit.main(["--licences"]) == 0


def test_where_a_licence_is_told() -> None:
    message = Message()
    assert audit.licence_of(message) == "unknown"
    message["License"] = "MIT\nwith more"
    assert audit.licence_of(message) == "MIT"
    message["Classifier"] = "License :: OSI Approved"
    message["Classifier"] = "License :: OSI Approved :: BSD License"
    assert audit.licence_of(message) == "BSD License"
    message["License-Expression"] = "BSD-3-Clause"
    assert audit.licence_of(message) == "BSD-3-Clause"


def direct() -> dict[str, str]:
    """Direct dependencies: normalised name -> requirement's name, serving-cpu's long tail aside."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = dict(project["optional-dependencies"])
    del extras["serving-cpu"]  # vLLM's own requirements, copied
    texts = itertools.chain(project["dependencies"], *extras.values())
    names = [re.match(r"[\w.-]+", text) for text in texts]
    return {normal(name[0]): name[0] for name in names if name}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def told() -> dict[str, str]:
    """The table of licences in docs/dependencies.md."""
    page = (ROOT / "docs" / "dependencies.md").read_text()
    section = page.partition("## Licences")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([\w.-]+)` \| (.+?) \|$", section, re.MULTILINE)
    return {normal(name): licence for name, licence in rows}


def test_every_direct_dependency_is_explained_and_its_licence_is_true() -> None:
    table = told()
    assert set(table) == set(direct())
    for name, licence in table.items():
        try:
            metadata = importlib.metadata.metadata(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra that is not installed here
        assert audit.licence_of(metadata) == licence or licence.endswith("(not in its metadata)")
