"""The house keeps its shape: folders, layers, what an import loads, what hides what."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from raysys import machine
from raysys.errors import CapabilityError
from raysys.ops.kernels import kernel_folder, kernel_path, load_kernel

ROOT = machine.app_root()


def test_kernels_is_no_package() -> None:
    assert kernel_folder() == ROOT / "kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_nothing_hides_the_published_kernels_package(tmp_path: Path) -> None:
    """With the checkout on the path, a regular package named kernels still wins over our folder."""
    published = tmp_path / "kernels"
    published.mkdir()
    (published / "__init__.py").write_text("WHO = 'published'\n")
    program = f"import sys; sys.path += [{str(ROOT)!r}, {str(tmp_path)!r}]; import kernels"
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"{program}; print(kernels.WHO)"],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
        timeout=60,
    )
    assert done.stdout.strip() == "published"


def test_missing_kernel_is_a_capability_error() -> None:
    with pytest.raises(CapabilityError, match=r"kernel absent\.py"):
        load_kernel("absent")
    with pytest.raises(CapabilityError, match="Reinstall"):
        kernel_path("absent.cpp")


def test_kernel_files_stand_alone() -> None:
    """A kernel imports torch, triton, numpy or the standard library, and nothing of ours."""
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, path
                names = [node.module or ""]
            roots = {name.split(".")[0] for name in names}
            allowed = {"torch", "triton", "numpy"} | sys.stdlib_module_names
            assert roots <= allowed, f"{path}: {roots - allowed}"


def test_importing_raysys_loads_no_runtime() -> None:
    program = (
        "import sys, raysys, raysys.config, raysys.runs, raysys.report, raysys.bench;"
        "print([m for m in ('ray', 'vllm', 'grpc', 'torch', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"


def test_every_system_is_held_independent() -> None:
    """A new system must be named in the import contracts, or nothing keeps it apart."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = settings["tool"]["importlinter"]["contracts"]
    (listed,) = [
        contract["modules"] for contract in contracts if contract["type"] == "independence"
    ]
    found = {
        f"raysys.{family}.{folder.parent.name}"
        for family in ("serving", "training", "federated")
        for folder in (ROOT / "raysys" / family).glob("*/__init__.py")
    }
    assert set(listed) == found - {"raysys.federated.core"}


def test_no_code_outside_the_known_folders() -> None:
    known = {"raysys", "actors", "jobs", "kernels", "tests", "docs"}
    hidden = {path.name for path in ROOT.iterdir() if path.name.startswith(".")}
    tracked = subprocess.run(
        ["git", "ls-files", "*.py"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=60,
    )
    if tracked.returncode != 0:
        pytest.skip("not a git checkout: cannot tell which files belong to the project")
    roots = {name.split("/")[0] for name in tracked.stdout.splitlines()}
    assert roots <= known | hidden


def test_no_file_is_long() -> None:
    """Small files: nothing over 400 lines, generated protocol code aside."""
    long = {}
    for folder in ("raysys", "actors", "jobs", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            lines = len(path.read_text(encoding="utf-8").splitlines())
            if lines > 400 and "_pb2" not in path.name:
                long[str(path.relative_to(ROOT))] = lines
    assert long == {}
