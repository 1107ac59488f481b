"""The command line: the catalogue of jobs, help, unknown jobs, the doctor."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from raysys import machine
from raysys.cli import doctor
from raysys.cli.catalogue import find_jobs
from raysys.cli.main import main


def test_catalogue_reads_without_importing(tmp_path: Path) -> None:
    jobs = tmp_path / "jobs"
    (jobs / "big").mkdir(parents=True)
    guard = '\nif __name__ == "__main__":\n    pass\n'
    (jobs / "small.py").write_text('"""Small job.\n\nMore."""\nimport nowhere\n' + guard)
    (jobs / "big" / "__main__.py").write_text('"""Big job."""\n' + guard)
    (jobs / "library.py").write_text('"""No job."""\n')
    (jobs / "__init__.py").write_text("")
    found = find_jobs(tmp_path)
    assert [(entry.name, entry.help) for entry in found] == [
        ("big", "Big job."),
        ("small", "Small job."),
    ]


def test_every_job_has_one_line_of_help() -> None:
    entries = find_jobs(machine.app_root())
    assert {"bench", "report", "submit", "tour"} <= {entry.name for entry in entries}
    assert all(10 < len(entry.help) < 100 for entry in entries)


def test_help_names_every_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {entry.name} " in text for entry in find_jobs(machine.app_root()))


@pytest.mark.parametrize("words", [["turo"], ["run", "turo"]])
def test_unknown_job(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "'turo'" in error
    assert "Did you mean 'tour'" in error


def test_run_needs_a_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run"]) == 2
    assert "JOB" in capsys.readouterr().err


def test_run_starts_the_job_as_a_process() -> None:
    command = [sys.executable, "-m", "raysys.cli", "run", "report", "/nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 6
    assert "holds no run" in done.stderr


def test_doctor_is_truthful_about_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("RAYSYS_TEMP", "/nowhere")
    monkeypatch.setenv("RAYSYS_DATA", "/nowhere")
    checks = (
        doctor.compiler,
        doctor.data,
        doctor.disk,
        doctor.gpu,
        doctor.package("no_such_module", "a test", "get it", required=True),
        doctor.package("json", "a test", "get it"),
        doctor.package("json", "a test", "get it", attribute="no_such_attribute"),
    )
    findings = doctor.examine(checks)
    assert [finding.state for finding in findings] == [
        "missing",
        "warning",
        "missing",
        "warning",
        "missing",
        "ok",
        "missing",
    ]
    assert "no_such_module" in findings[4].detail
    assert all(finding.remedy for finding in findings if finding.state != "ok")


@pytest.mark.parametrize(
    ("free_gib", "total_gib", "state"),
    [(5, 50, "ok"), (4.9, 50, "warning"), (50, 1001, "warning"), (51, 1000, "ok")],
)
def test_doctor_tells_of_every_folder_that_is_short_of_room(
    free_gib: float, total_gib: float, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, temp = tmp_path / "home", tmp_path / "temp"
    temp.mkdir()
    monkeypatch.setenv("RAYSYS_HOME", str(home))
    monkeypatch.setenv("RAYSYS_TEMP", str(temp))

    def usage(path: Path) -> SimpleNamespace:
        assert path.exists()
        few = path == temp
        free, total = (free_gib, total_gib) if few else (600, 1000)
        return SimpleNamespace(free=free * 2**30, total=total * 2**30)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    finding = doctor.disk()
    assert finding.state == state
    assert bool(finding.remedy) == (state != "ok")
    assert f"{free_gib:.1f} GiB of {total_gib} free for temporary folders {temp}" in finding.detail
    assert f"600.0 GiB of 1000 free for runs {Path('runs').absolute()}, cache {home}" in (
        finding.detail
    )


@pytest.mark.parametrize(
    ("script", "seen"),
    [("echo no headers >&2; exit 1", "no headers"), ("exit 0", "cannot open shared object")],
)
def test_doctor_notices_a_broken_compiler(
    script: str, seen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "g++"
    broken.write_text(f"#!/bin/sh\n{script}\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    finding = doctor.compiler()
    assert finding.state == "missing"
    assert seen in finding.detail


def test_doctor_takes_the_compiler_that_the_kernels_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says is ok builds kernels, whatever the compiler is called."""
    real = shutil.which("g++") or shutil.which("clang++")
    if real is None:
        pytest.skip("no C++ compiler here")
    assert doctor.compiler().state == "ok"
    only = tmp_path / "bin"
    only.mkdir()
    (only / "c++").symlink_to(real)
    for tool in ("as", "ld"):
        if (path := shutil.which(tool)) is not None:
            (only / tool).symlink_to(path)
    monkeypatch.setenv("PATH", str(only))
    finding = doctor.compiler()
    assert finding.state == "ok"
    assert finding.detail.startswith("c++ compiles for")


def _doctor(checks: str, environment: dict[str, str], *prefix: str) -> str:
    """What the doctor prints in a process of its own with these checks."""
    program = f"import sys; from raysys.cli import doctor; doctor.CHECKS = ({checks},);"
    program += "sys.exit(doctor.main([]))"
    done = subprocess.run(
        [*prefix, sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stderr == ""
    return done.stdout


def test_doctor_on_a_machine_without_vllm(tmp_path: Path) -> None:
    """vLLM is really hidden: its place on the path is taken by what cannot be imported."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise ImportError('hidden')\n")
    path = os.pathsep.join([str(tmp_path), str(machine.app_root())])
    text = _doctor("doctor.package('vllm', 'serving', doctor._VLLM)", {"PYTHONPATH": path})
    assert "MISSING  vllm: ImportError: hidden" in text
    assert "make setup" in text


def test_doctor_on_a_machine_without_network() -> None:
    """In a network namespace of its own: no route to anywhere, and loopback is down."""
    alone = ("unshare", "--map-root-user", "--net")
    if (
        shutil.which("unshare") is None
        or subprocess.run([*alone, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("network namespaces are not allowed here")
    text = _doctor("doctor.outside, doctor.loopback", {}, *alone)
    assert "note     outside network: no route" in text
    assert "MISSING  loopback network" in text
    assert "Bring up the interface lo" in text


def test_doctor_exit_code_follows_what_is_required(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = doctor.package("json", "a test", "get it", required=True)
    monkeypatch.setattr(doctor, "CHECKS", (good, doctor.loopback))
    assert doctor.main(["--json"]) == 0
    assert [item["state"] for item in json.loads(capsys.readouterr().out)] == ["ok", "ok"]
    bad = doctor.package("no_such_module", "a test", "get it", required=True)
    monkeypatch.setattr(doctor, "CHECKS", (good, bad))
    assert doctor.main([]) == 3
    assert "MISSING  no_such_module" in capsys.readouterr().out


def test_doctor_runs_without_any_dependency(tmp_path: Path) -> None:
    """With the standard library alone (-S hides site-packages) it still answers, truthfully."""
    environment = {"PYTHONPATH": str(machine.app_root()), "HOME": str(tmp_path), "PATH": "/nowhere"}
    program = (
        "from raysys.cli import doctor; import sys;"
        "doctor.CHECKS = (doctor.python_version, doctor.compiler,"
        " doctor.package('ray', 'all', 'get it', required=True));"
        "sys.exit(doctor.main([]))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert "ok       Python" in done.stdout
    assert "MISSING  C++ compiler" in done.stdout
