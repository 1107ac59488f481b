"""The wheel: one top-level name, and it runs from an empty environment."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from raysys import machine

ROOT = machine.app_root()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--wheel",
        "--outdir",
        str(folder),
        str(ROOT),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def empty_environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with this wheel and nothing else; returns its Python."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=120)
    python = folder / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel)], check=True, timeout=120)
    return python


def run(python: Path, *words: str, **extra: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], **extra}
    return subprocess.run(
        [str(python), "-m", "raysys.cli", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env=environment,
        timeout=240,
    )


def test_one_top_level_name(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    roots = {name.split("/")[0] for name in names}
    assert {root for root in roots if not root.endswith(".dist-info")} == {"raysys"}
    assert "raysys/_app/jobs/tour/__main__.py" in names
    assert "raysys/_app/actors/session.py" in names
    assert "raysys/_kernels/README.md" in names
    assert not [name for name in names if name.endswith("kernels/__init__.py")]


def test_runs_from_an_empty_environment(empty_environment: Path) -> None:
    listed = run(empty_environment, "list")
    assert listed.returncode == 0, listed.stderr
    assert "tour" in listed.stdout


def test_doctor_tells_what_the_empty_environment_lacks(empty_environment: Path) -> None:
    looked = run(empty_environment, "doctor")
    assert looked.returncode == 3
    assert "MISSING  ray: ModuleNotFoundError" in looked.stdout


def test_jobs_run_from_the_wheel(empty_environment: Path, tmp_path: Path) -> None:
    """With the dependencies beside it, but not this checkout, the wheel runs its own jobs."""
    site = sysconfig.get_paths()["purelib"]
    where = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    own = subprocess.run(
        [str(empty_environment), "-c", where],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout.strip()
    # A path file only appends: the wheel comes first, and editable installs are not read.
    (Path(own) / "dependencies.pth").write_text(f"{site}\n")
    done = run(empty_environment, "report", str(tmp_path))
    assert done.returncode == 6, done.stderr
    assert "holds no run" in done.stderr
    probe = "import jobs.report, raysys; print(jobs.report.__file__, raysys.__file__)"
    app = Path(own) / "raysys" / "_app"
    shown = subprocess.run(
        [str(empty_environment), "-c", probe],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
        env={"PYTHONPATH": str(app), "PATH": os.environ["PATH"]},
        timeout=120,
    )
    assert str(ROOT) + "/jobs" not in shown.stdout
    assert shown.stdout.count(own) == 2
