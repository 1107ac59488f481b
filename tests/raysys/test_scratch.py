"""Temporary folders: gone at the end, and gone at the next start where the owner was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from raysys import machine, scratch
from raysys.errors import StorageError

HOLDS = """
import sys
from raysys import scratch
path = scratch.kept("held")
(path / "inner").mkdir()
(path / "inner" / "file").write_text("x")
print(path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYSYS_TEMP", str(tmp_path))


@contextmanager
def holder(program: str = HOLDS, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that holds a folder until its standard input ends."""
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(machine.app_root())},
    ) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())


def test_a_folder_goes_with_its_block(tmp_path: Path) -> None:
    with scratch.folder("mine") as path:
        assert path.parent.parent == tmp_path
        assert list(path.iterdir()) == []
        (path / "file").write_text("x")
        assert scratch.sweep() == 0
    assert not path.exists()
    with pytest.raises(KeyError), scratch.folder("mine") as path:
        raise KeyError
    assert not path.exists()


def test_a_killed_process_leaves_its_folder_until_the_next_start() -> None:
    with holder() as (killed, left), holder() as (living, held):
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert left.is_dir()
        with scratch.folder("next"):
            assert not left.exists()
            assert (held / "inner" / "file").is_file()
        living.communicate()
    assert not held.exists()


def test_a_forked_child_neither_removes_nor_loses_the_folder() -> None:
    with scratch.folder("forked"):
        made = scratch.Scratch.make("parent")
        child = os.fork()
        if child == 0:
            made.close()
            os._exit(0)
        os.waitpid(child, 0)
        assert scratch.sweep() == 0
        assert made.path.is_dir()
        made.close()
        made.close()
        assert not made.path.exists()


def test_only_folders_inside_the_place_are_removed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (scratch.root() / "link").symlink_to(outside)
    (scratch.root() / "file").write_text("x")
    (scratch.root() / "left").mkdir()
    assert scratch.sweep() == 1
    assert outside.is_dir()
    assert {path.name for path in scratch.root().iterdir()} == {"link", "file"}


def test_a_place_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    scratch.root().chmod(0o777)
    with pytest.raises(StorageError, match="RAYSYS_TEMP"):
        scratch.kept("x")


def test_a_place_that_cannot_be_made_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("RAYSYS_TEMP", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="RAYSYS_TEMP"), scratch.folder("x"):
        pass


def test_a_file_system_without_locks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_locked", lambda path: None)
    with pytest.raises(StorageError, match="cannot lock"):
        scratch.Scratch.make("x")


FILLS = """
import sys
from pathlib import Path
from raysys import scratch
with scratch.beside(Path(sys.argv[1])) as path:
    (path / "file").write_text("x")
    print(path, flush=True)
    sys.stdin.read()
"""


def test_an_unfinished_folder_beside_its_target_goes_with_the_next_one(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model[1]"
    with scratch.beside(target) as path:
        assert path.parent == target.parent
        (path / "file").write_text("x")
        path.rename(target)
    assert (target / "file").read_text() == "x"
    aside = target.with_name(".model[1]-old-7")
    aside.mkdir()
    with holder(FILLS, str(target)) as (process, unfinished):
        with scratch.beside(target):
            assert (unfinished / "file").is_file(), "its process lives"
        process.send_signal(signal.SIGKILL)
    assert unfinished.is_dir()
    with scratch.beside(target):
        assert not unfinished.exists()
    assert aside.is_dir()
    assert sorted(p.name for p in target.parent.iterdir()) == [aside.name, target.name]
