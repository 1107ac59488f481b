"""Run directories: atomic files, tables in parts, checkpoints that are complete or absent."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.errors import ConfigError, DataError, StorageError
from raysys.runs import RunDirectory
from raysys.runs import storage as storage_module
from raysys.runs.storage import Storage

NOW = "2026-01-01T00:00:00+00:00"


def make(path: Path) -> RunDirectory:
    return RunDirectory.create(str(path), job="demo", config={"a": 1}, seeds=[3], now=NOW)


def leftovers(path: Path) -> list[str]:
    return [name.name for name in path.rglob(".part-*")]


def test_manifest_round_trip(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    run.set_status("finished", NOW)
    again = RunDirectory.open(str(tmp_path / "run"))
    assert again.manifest == run.manifest
    assert again.manifest.status == "finished"
    assert again.manifest.config == {"a": 1}
    assert again.manifest.host["packages"]["raysys"]


def test_file_uri_is_a_location(tmp_path: Path) -> None:
    run = RunDirectory.create(f"file://{tmp_path}/run", job="x", config={}, seeds=[], now=NOW)
    run.write_json("result.json", [1])
    assert (tmp_path / "run" / "result.json").read_text() == "[\n  1\n]"


def test_a_second_run_in_the_same_place_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(StorageError, match="already holds a run"):
        make(tmp_path)


def test_open_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="holds no run"):
        RunDirectory.open(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": 1}', b'{"version": 99}'])
def test_damaged_manifest(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=r"manifest\.json"):
        RunDirectory.open(str(tmp_path))


def test_unknown_scheme_is_refused() -> None:
    with pytest.raises(StorageError, match="not a usable location"):
        Storage("nowhere://bucket/run")


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises(StorageError):
        make(tmp_path / "run")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_named(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    run.write_json("result.json", {"old": 1})

    class FullStream:
        """An output stream on a device that is always full."""

        def __init__(self) -> None:
            self.file = os.open("/dev/full", os.O_WRONLY)

        def __enter__(self) -> FullStream:
            return self

        def __exit__(self, *error: object) -> None:
            os.close(self.file)

        def write(self, content: bytes) -> int:
            return os.write(self.file, content)

    class FullFilesystem:
        """The local filesystem, with every new file on the full device."""

        def __getattr__(self, name: str) -> object:
            return getattr(inner, name)

        def open_output_stream(self, path: str) -> FullStream:
            return FullStream()

    inner = run.storage.filesystem
    run.storage.filesystem = FullFilesystem()
    with pytest.raises(StorageError, match="no space left"):
        run.write_json("result.json", {"new": 2})
    run.storage.filesystem = inner
    assert run.read_json("result.json") == {"old": 1}
    assert leftovers(tmp_path) == []


def test_failed_write_leaves_the_old_content(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write("a.txt", b"old")

    def write_half() -> None:
        with storage.writer("a.txt") as file:
            file.write(b"half")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        write_half()
    assert storage.read("a.txt") == b"old"
    assert leftovers(tmp_path) == []


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        make(tmp_path).write_json("x.json", float("nan"))


def test_damaged_json_is_named(tmp_path: Path) -> None:
    run = make(tmp_path)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(DataError, match=r"x\.json"):
        run.read_json("x.json")


@settings(max_examples=20, deadline=None)
@given(parts=st.lists(st.lists(st.integers(-9, 9), max_size=4), max_size=12))
def test_tables_keep_order_and_rows(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[int]]
) -> None:
    run = make(tmp_path_factory.mktemp("run"))
    for part in parts:
        run.append_rows("values", [{"x": value} for value in part])
    expected = [value for part in parts for value in part]
    if expected:
        assert run.read_table("values").column("x").to_pylist() == expected
    else:
        assert run.tables() == []


def test_tables_may_gain_columns(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.append_rows("t", [{"a": 1}])
    run.append_table("t", pa.table({"a": [2], "b": [0.5]}))
    assert run.read_table("t").to_pylist() == [{"a": 1, "b": None}, {"a": 2, "b": 0.5}]


def test_damaged_part_is_named(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.append_rows("t", [{"a": 1}])
    part = next((tmp_path / "tables" / "t").iterdir())
    part.write_bytes(b"PAR1")
    with pytest.raises(DataError, match=part.name):
        run.read_table("t")


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden", "a\\b"])
def test_table_names_cannot_escape(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="plain name"):
        make(tmp_path).append_rows(name, [{"a": 1}])


def test_checkpoints_keep_the_newest(tmp_path: Path) -> None:
    run = make(tmp_path)
    assert run.load_checkpoint() is None
    for step in (1, 5, 3, 9):
        run.save_checkpoint(step, {"w.bin": bytes([step]), "state.json": b"{}"}, keep=2)
    assert run.checkpoints() == [5, 9]
    assert run.load_checkpoint() == (9, {"state.json": b"{}", "w.bin": b"\x09"})
    assert run.load_checkpoint(5)[1]["w.bin"] == b"\x05"  # type: ignore[index]
    with pytest.raises(StorageError, match="no such checkpoint"):
        run.load_checkpoint(1)


def test_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.save_checkpoint(1, {"a": b"1", "b": b"1"})
    run.save_checkpoint(1, {"a": b"2"})
    assert run.load_checkpoint() == (1, {"a": b"2"})


def test_failed_checkpoint_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(tmp_path)
    run.save_checkpoint(1, {"a": b"1"})
    real = Storage.write

    def fail_on_second(storage: Storage, name: str, content: bytes) -> None:
        if name.endswith("/b"):
            raise StorageError(name, "no space left on the device")
        real(storage, name, content)

    monkeypatch.setattr(storage_module.Storage, "write", fail_on_second)
    with pytest.raises(StorageError, match="no space left"):
        run.save_checkpoint(2, {"a": b"2", "b": b"2"})
    assert run.load_checkpoint() == (1, {"a": b"1"})
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("step", "files", "keep"), [(-1, {"a": b""}, 1), (0, {}, 1), (0, {"a": b""}, 0)]
)
def test_bad_checkpoint_arguments(
    tmp_path: Path, step: int, files: dict[str, bytes], keep: int
) -> None:
    with pytest.raises(ConfigError, match="checkpoint"):
        make(tmp_path).save_checkpoint(step, files, keep=keep)
