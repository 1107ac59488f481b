"""A model folder is checked before an engine starts; every kind of damage names its file."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.errors import DataError, StorageError
from raysys.serving.model_files import check_folder, check_safetensors, list_checksums, read_facts

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
    "vocab_size": 100,
}
REMEDY = "Get it again"


def write_weights(path: Path, values: int = 16) -> None:
    entry = {"dtype": "F32", "shape": [values], "data_offsets": [0, 4 * values]}
    header = json.dumps({"weight": entry, "__metadata__": {"format": "pt"}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4 * values))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    (model / "tokenizer.json").write_text("{}")
    (model / "tokenizer_config.json").write_text("{}")
    write_weights(model / "model.safetensors")
    return model


def test_a_whole_folder_gives_its_facts(folder: Path) -> None:
    facts = check_folder(folder, REMEDY)
    assert facts.architecture == "LlamaForCausalLM"
    # keys and values, 3 layers, 2 heads of 64 / 4 numbers
    assert facts.kv_values_per_token == 2 * 3 * 2 * 16
    assert facts.kv_bytes(tokens=10, bytes_per_value=4) == 10 * 192 * 4


def test_a_missing_folder_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no such model folder.*Get it again") as caught:
        check_folder(tmp_path / "absent", REMEDY)
    assert not isinstance(caught.value, DataError)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(DataError) as caught:
        check_folder(folder, REMEDY)
    assert Path(caught.value.path).suffix == Path(name).suffix


@given(cut=st.integers(min_value=0, max_value=63))
@settings(max_examples=20, deadline=None)
def test_weights_cut_anywhere_in_the_data_are_refused(
    cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    write_weights(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 64 + cut])
    with pytest.raises(DataError, match="its header tells"):
        check_safetensors(path, REMEDY)


@pytest.mark.parametrize("content", [b"", b"\x05", b"\xff" * 16, struct.pack("<Q", 4) + b"nope"])
def test_a_broken_header_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(DataError, match="safetensors header"):
        check_safetensors(path, REMEDY)


def test_an_altered_file_is_found_by_its_checksum(folder: Path) -> None:
    list_checksums(folder, {"package": "test"})
    check_folder(folder, REMEDY)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    check_folder(folder, REMEDY, checksums=False)  # same size: only the checksum tells
    with pytest.raises(DataError, match="checksum") as caught:
        check_folder(folder, REMEDY)
    assert caught.value.path == str(weights)


def test_a_listed_file_of_another_size_or_gone_is_named(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("hello")
    list_checksums(folder, {})
    (folder / "chat_template.jinja").write_text("hello!")
    with pytest.raises(DataError, match="6 bytes instead of 5"):
        check_folder(folder, REMEDY, checksums=False)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="missing"):
        check_folder(folder, REMEDY)


def test_a_foreign_list_of_checksums_is_refused(folder: Path) -> None:
    (folder / "raysys-model.json").write_text(json.dumps({"format": 99, "files": {}}))
    with pytest.raises(DataError, match="format 1"):
        check_folder(folder, REMEDY)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ("{}", "text model"),
        (json.dumps(CONFIG | {"architectures": []}), "text model"),
        (json.dumps(CONFIG | {"num_attention_heads": 0}), "text model"),
    ],
)
def test_an_unusable_config_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(DataError, match=reason):
        read_facts(path, REMEDY)
