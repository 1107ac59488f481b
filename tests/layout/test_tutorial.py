"""The tutorial's system, taken from the page, put into a copy of the tree, and run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from raysys import machine

ROOT = machine.app_root()
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
FILES = dict(
    re.findall(r"^`([\w/]+\.py)`\n\n```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree with the tutorial's files in it."""
    root = tmp_path_factory.mktemp("tree")
    for folder in ("raysys", "actors", "jobs", "kernels"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    for name, text in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def call(tree: Path, environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=tree,
        env={**environment, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_the_page_has_every_piece() -> None:
    assert {name.split("/")[0] for name in FILES} == {"raysys", "actors", "jobs", "tests"}
    assert "jobs/bench/reservoir.py" in FILES


def test_its_own_tests_hold(tree: Path) -> None:
    tests = "tests/raysys/training/test_reservoir.py"
    words = ("pytest", "-q", "-p", "no:cacheprovider", "-p", "no:schemathesis", tests)
    assert " passed" in call(tree, dict(os.environ), *words).stdout


def test_its_code_is_in_the_house_style(tree: Path) -> None:
    """The same formatter and linter; nothing in the core knows Ray."""
    names = list(FILES)
    for words in (("ruff", "format", "--check", *names), ("ruff", "check", "--no-cache", *names)):
        call(tree, dict(os.environ), *words)
    assert "import ray" not in "".join(FILES[name] for name in FILES if name.startswith("raysys"))


@pytest.mark.cluster
def test_its_job_runs_on_ray(
    tree: Path, tmp_path: Path, isolate: Callable[[Path], dict[str, str]]
) -> None:
    words = ("raysys.cli", "run", "reservoir", "--run-dir", str(tmp_path / "run"))
    environment = isolate(tmp_path)
    small = ("--set", "batches=3", "--set", "reservoir.size=50")
    done = call(tree, environment, *words, *small)
    assert "50 of 30000 items" in done.stdout
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert len(result["sample"]) == 50
    assert "reservoir" in call(tree, environment, "raysys.cli", "list").stdout


def test_its_benchmark_measures_both_sides(tree: Path) -> None:
    words = ("jobs.bench", "reservoir", "--only", "items_per_cpu_second", "--json", "-")
    result = json.loads(call(tree, dict(os.environ), *words).stdout)
    (claim,) = result["claims"]
    assert claim["value"] > 0
    assert claim["baseline"]["value"] > 0
