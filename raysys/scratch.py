"""Temporary folders that do not outlive a killed process for long.

``with scratch.folder("lte") as path`` removes its folder at the end, as ``tempfile`` does. SIGKILL
leaves it behind: so all lie in one place of the user's, each locked by the process that made it,
and whoever makes the next one first removes those that nobody holds. The kernel lets a lock go with
its process (and the children that it forked); unlike process ids, locks are not given anew and hold
between containers that share a folder.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import glob
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from raysys import machine
from raysys.errors import StorageError

ATTEMPTS = 20  # another process may sweep a folder between its making and its locking
_REMEDY = "Set RAYSYS_TEMP to a folder that only you may write to"


class Scratch:
    """One folder with its lock; ``close`` may be called twice."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock
        self._owner = os.getpid()

    @classmethod
    def make(cls, name: str) -> Scratch:
        """Remove what dead processes left and make a new, empty folder.

        Raises:
            StorageError: the place for temporary folders cannot be written to, or is a stranger's.
        """
        place = root()
        try:
            sweep()
            for _ in range(ATTEMPTS):
                path = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=place))
                lock = _locked(path)
                if lock is not None:
                    return cls(path, lock)
        except OSError as error:
            raise StorageError(str(place), error.strerror or str(error), _REMEDY) from error
        raise StorageError(str(place), "cannot lock a folder there", _REMEDY)

    def close(self) -> None:
        """Remove the folder; a forked child's call leaves it."""
        if self._lock >= 0 and self._owner == os.getpid():
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


@contextlib.contextmanager
def folder(name: str) -> Iterator[Path]:
    """An empty folder for the length of a block.

    Raises:
        StorageError: it cannot be made.
    """
    scratch = Scratch.make(name)
    try:
        yield scratch.path
    finally:
        scratch.close()


def kept(name: str) -> Path:
    """An empty folder for as long as this process lives.

    Raises:
        StorageError: it cannot be made.
    """
    scratch = Scratch.make(name)
    atexit.register(scratch.close)
    return scratch.path


def root() -> Path:
    """The user's place for temporary folders, made where it is missing.

    Raises:
        StorageError: it cannot be made, or others may write there.
    """
    place = (machine.temp_dir() or Path(tempfile.gettempdir())) / f"raysys-{os.getuid()}"
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = place.lstat()
    except OSError as error:
        raise StorageError(str(place), error.strerror or str(error), _REMEDY) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise StorageError(str(place), "is not a folder of yours alone", _REMEDY)
    return place


def sweep() -> int:
    """Remove the folders that no living process holds; return how many those were."""
    removed = 0
    with os.scandir(root()) as entries:
        paths = [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    for path in paths:
        removed += _remove_if_free(path)
    return removed


@contextlib.contextmanager
def beside(target: Path) -> Iterator[Path]:
    """An empty folder beside ``target``, on the same disk, to be renamed to it once it is complete.

    What killed processes left there for the same target goes first. At the end of the block the
    folder is removed, unless it was renamed.

    Raises:
        OSError: it cannot be made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.part-"
    for old in target.parent.glob(glob.escape(prefix) + "*"):
        _remove_if_free(old)
    for left in range(ATTEMPTS, 0, -1):
        partial = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
        lock = _locked(partial)
        if lock is not None or left == 1:  # no lock where a disk has none: then nobody removes it
            break
        shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _remove_if_free(path: Path) -> bool:
    """Remove a folder that no living process holds; whether it is gone."""
    lock = _locked(path)
    if lock is None:
        return False
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)
    return not path.exists()


def _locked(path: Path) -> int | None:
    """An open, exclusive lock on a folder; None where another has it, or it is gone."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_ino == path.stat().st_ino:  # not swept between opening and locking
            return lock
    except OSError:
        pass
    os.close(lock)
    return None
