"""Compile a C++ kernel of ``kernels/`` at first use and load it with ctypes.

The library is built for the instruction set of this machine (AVX-512, AVX2 or the portable
baseline), kept in :func:`raysys.machine.cache_dir` under a hash of everything that decides its
content, and put in place by an atomic rename, so processes that build it at once do no harm.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from raysys import machine
from raysys.errors import CapabilityError, ConfigError, StorageError
from raysys.ops.kernels import kernel_path

# Results must not depend on the instruction set: no fused multiply-add behind our back.
# No calls of memset or memcpy for rows of a few floats: the call costs more than the copy.
BASE_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-tree-loop-distribute-patterns",
)
_AVX2 = ("-mavx2", "-mbmi", "-mbmi2", "-mpopcnt", "-mlzcnt")
ISA_FLAGS: Mapping[str, tuple[str, ...]] = {
    "avx512": (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    "avx2": _AVX2,
    "portable": (),
}
_AVX2_NEEDS = frozenset({"avx2", "bmi1", "bmi2", "popcnt", "abm"})
_ISA_NEEDS: Mapping[str, frozenset[str]] = {
    "avx512": _AVX2_NEEDS | {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx2": _AVX2_NEEDS,
    "portable": frozenset(),
}
_INCLUDE = re.compile(r'^\s*#include\s+"([^"]+)"', re.MULTILINE)


def runnable_isas() -> tuple[str, ...]:
    """Instruction sets that this machine can run, best first; always ends with "portable"."""
    flags = machine.cpu_flags()
    return tuple(name for name, needs in _ISA_NEEDS.items() if needs <= flags)


@functools.cache
def compile_and_load(name: str, isa: str | None = None) -> ctypes.CDLL:
    """Load ``kernels/<name>.cpp``, compiling it if no build of exactly this source is cached.

    Args:
        name: file name without ``.cpp``; its quoted includes are looked for in ``kernels/``.
        isa: "avx512", "avx2" or "portable"; None takes the best that this machine runs.

    Raises:
        CapabilityError: there is no C++ compiler, or it cannot build the source.
        ConfigError: this machine cannot run ``isa``.
        StorageError: the cache folder cannot be written.
    """
    chosen = isa or runnable_isas()[0]
    if chosen not in runnable_isas():
        raise ConfigError("isa", chosen, "one of " + ", ".join(runnable_isas()))
    command = [find_compiler(), *BASE_FLAGS, *ISA_FLAGS[chosen]]
    target = _target(name, chosen, command)
    if not target.is_file():
        _build(kernel_path(f"{name}.cpp"), target, command)
    return ctypes.CDLL(str(target))


def find_compiler() -> str:
    """Path of the C++ compiler.

    Raises:
        CapabilityError: there is none.
    """
    found = next((path for name in ("g++", "clang++", "c++") if (path := shutil.which(name))), None)
    if found is None:
        raise CapabilityError(
            "a C++ compiler",
            "none of g++, clang++ and c++ is on PATH",
            "Install one (Debian: apt-get install g++), or use the reference implementation",
        )
    return found


def _target(name: str, isa: str, command: list[str]) -> Path:
    digest = hashlib.sha256(" ".join(command).encode())
    for source in _sources(f"{name}.cpp"):
        digest.update(source.name.encode() + source.read_bytes())
    return machine.cache_dir() / "native" / f"{name}-{isa}-{digest.hexdigest()[:20]}.so"


def _sources(filename: str) -> list[Path]:
    """The file and all that it includes from ``kernels/``, sorted by name."""
    found: dict[str, Path] = {}
    waiting = [filename]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found[current] = kernel_path(current)
            waiting += _INCLUDE.findall(found[current].read_text(encoding="utf-8"))
    return [found[key] for key in sorted(found)]


def _build(source: Path, target: Path, command: list[str]) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=target.parent, suffix=".part")
        os.close(handle)
    except OSError as error:
        reason = f"the kernel cache cannot be written: {error.strerror}"
        raise StorageError(str(target.parent), reason, "Set RAYSYS_HOME") from error
    try:
        done = subprocess.run(
            [*command, str(source), "-o", partial], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            reason = f"{command[0]} failed on {source.name}: {done.stderr.strip()[-600:]}"
            raise CapabilityError(
                f"compiled kernel {source.stem}", reason, "Use a C++17 compiler (GCC 9, Clang 10)"
            )
        os.chmod(partial, 0o755)
        os.replace(partial, target)
    finally:
        Path(partial).unlink(missing_ok=True)
