"""Find and load files of ``kernels/`` by location.

``kernels/`` is not a package: a published package of that import name is used by transformers and
vLLM, and a package of ours would hide it. So nobody writes ``import kernels``; a kernel file stands
alone and is loaded from its path, which is the checkout's ``kernels/`` or a wheel's
``raysys/_kernels``.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import raysys
from raysys.errors import CapabilityError


def kernel_folder() -> Path:
    """Folder with the device source files."""
    package = Path(raysys.__file__).resolve().parent
    packaged = package / "_kernels"
    return packaged if packaged.is_dir() else package.parent / "kernels"


def kernel_path(filename: str) -> Path:
    """Path of ``kernels/<filename>``.

    Raises:
        CapabilityError: the installation has no such kernel file.
    """
    path = kernel_folder() / filename
    if not path.is_file():
        raise CapabilityError(
            f"kernel {filename}",
            f"{path} does not exist",
            "Reinstall raysys: its files are damaged",
        )
    return path


@functools.cache
def load_kernel(name: str) -> ModuleType:
    """Load ``kernels/<name>.py`` as module ``raysys_kernels_<name>``, once per process.

    Raises:
        CapabilityError: the file does not exist.
    """
    path = kernel_path(f"{name}.py")
    module_name = f"raysys_kernels_{name}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickling look the module up by name
    spec.loader.exec_module(module)
    return module
