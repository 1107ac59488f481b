"""What a servable model folder holds, and whether it is whole.

A folder is in the Hugging Face layout: ``config.json``, tokenizer files and ``*.safetensors``. It
is checked *before* an engine starts, because an engine takes a minute to find out and then reports
it from another process. A folder that raysys prepared also carries a list of checksums.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysys.errors import DataError, StorageError

CHECKSUMS = "raysys-model.json"
REQUIRED = ("config.json", "tokenizer.json", "tokenizer_config.json")
WEIGHTS = "*.safetensors"
FORMAT = 1

_HEADER_LIMIT = 100 * 2**20  # the safetensors format's own limit
_BLOCK = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What serving needs to know of a model.

    Args:
        architecture: class name, such as ``"LlamaForCausalLM"``.
        max_length: longest context in tokens.
        kv_values_per_token: numbers that one token adds to the KV cache, keys and values together.
        vocabulary: number of token ids.
    """

    architecture: str
    max_length: int
    kv_values_per_token: int
    vocabulary: int

    def kv_bytes(self, tokens: int, bytes_per_value: int) -> int:
        """Bytes of KV cache for ``tokens`` tokens."""
        return tokens * self.kv_values_per_token * bytes_per_value


def check_folder(folder: Path, remedy: str, *, checksums: bool = True) -> ModelFacts:
    """Check a model folder and return its facts.

    Args:
        folder: in the Hugging Face layout.
        remedy: what a user can do if it is not usable; part of every error.
        checksums: compare contents where the folder lists checksums (else only sizes).

    Raises:
        StorageError: there is no such folder.
        DataError: a file is missing, cut short or altered, or says nothing usable.
    """
    if not folder.is_dir():
        raise StorageError(str(folder), "no such model folder", remedy)
    for name in REQUIRED:
        if not (folder / name).is_file():
            raise DataError(str(folder / name), "missing from the model folder", remedy)
    weights = sorted(folder.glob(WEIGHTS))
    if not weights:
        raise DataError(str(folder / WEIGHTS), "no weights in the model folder", remedy)
    facts = read_facts(folder / "config.json", remedy)
    if (folder / CHECKSUMS).is_file():
        _check_listed(folder, remedy, checksums)
    for path in weights:
        check_safetensors(path, remedy)
    return facts


def read_facts(path: Path, remedy: str) -> ModelFacts:
    """Read the facts from a ``config.json``.

    Raises:
        DataError: it is not JSON, or lacks a field.
    """
    config = _read_json(path, remedy)
    try:
        heads = int(config["num_attention_heads"])
        head_size = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
        kv_heads = int(config.get("num_key_value_heads") or heads)
        return ModelFacts(
            architecture=str(config["architectures"][0]),
            max_length=int(config["max_position_embeddings"]),
            kv_values_per_token=2 * int(config["num_hidden_layers"]) * kv_heads * head_size,
            vocabulary=int(config["vocab_size"]),
        )
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        reason = f"not the configuration of a text model ({error!r})"
        raise DataError(str(path), reason, remedy) from None


def check_safetensors(path: Path, remedy: str) -> None:
    """Check that a weight file is as long as its own header says.

    Raises:
        DataError: it is cut short, too long, or has no readable header.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 0 < length <= min(size - 8, _HEADER_LIMIT):
            raise DataError(str(path), "no safetensors header", remedy)
        try:
            header = json.loads(file.read(length))
            entries = [entry for name, entry in header.items() if name != "__metadata__"]
            end = max(int(entry["data_offsets"][1]) for entry in entries)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise DataError(str(path), "unreadable safetensors header", remedy) from None
    if size != 8 + length + end:
        reason = f"{size} bytes instead of the {8 + length + end} that its header tells"
        raise DataError(str(path), reason, remedy)


def list_checksums(folder: Path, source: Mapping[str, Any]) -> None:
    """Write the list of checksums of everything in ``folder``.

    Args:
        source: where the model came from; JSON-ready.
    """
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != CHECKSUMS
    }
    listing = {"format": FORMAT, "source": dict(source), "files": files}
    (folder / CHECKSUMS).write_text(json.dumps(listing, indent=2) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _check_listed(folder: Path, remedy: str, checksums: bool) -> None:
    listing = _read_json(folder / CHECKSUMS, remedy)
    files = listing.get("files")
    if listing.get("format") != FORMAT or not isinstance(files, dict):
        raise DataError(str(folder / CHECKSUMS), f"not a list of format {FORMAT}", remedy)
    for name, entry in files.items():
        path = folder / Path(name).name
        if not path.is_file():
            raise DataError(str(path), "missing from the model folder", remedy)
        size = path.stat().st_size
        if size != entry["bytes"]:
            reason = f"{size} bytes instead of {entry['bytes']}"
            raise DataError(str(path), reason, remedy)
        if checksums and sha256(path) != entry["sha256"]:
            raise DataError(str(path), "its checksum is not the listed one", remedy)


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(str(path), error.strerror or str(error), remedy) from error
    except ValueError as error:
        raise DataError(str(path), f"not JSON ({error})", remedy) from None
    if not isinstance(value, dict):
        raise DataError(str(path), "not a JSON object", remedy)
    return value
