"""Every C++ kernel compiles for every instruction set, also those that this machine cannot run."""

from __future__ import annotations

import platform
import subprocess

import pytest

from raysys.ops.kernels import kernel_folder
from raysys.ops.native import BASE_FLAGS, ISA_FLAGS, find_compiler

SOURCES = sorted(kernel_folder().glob("*.cpp"))


@pytest.mark.parametrize("isa", sorted(ISA_FLAGS))
@pytest.mark.parametrize("name", [source.name for source in SOURCES])
def test_compiles(name: str, isa: str) -> None:
    if isa != "portable" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("flags of x86 compilers")
    command = [find_compiler(), *BASE_FLAGS, *ISA_FLAGS[isa], "-fsyntax-only", name]
    done = subprocess.run(command, cwd=kernel_folder(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_there_are_kernels() -> None:
    assert {"fiited_store.cpp", "lte_ffn.cpp"} <= {source.name for source in SOURCES}
