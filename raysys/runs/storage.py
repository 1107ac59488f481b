"""Atomic files on a local path or any ``pyarrow.fs`` URI.

Every file is written under a temporary name and then renamed, so a reader never sees half a file
and a full disk leaves the previous version in place.
"""

from __future__ import annotations

import contextlib
import errno
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from pyarrow import ArrowException
from pyarrow import fs as arrow_fs

from raysys.errors import StorageError

TEMPORARY_PREFIX = ".part-"


class Storage:
    """A folder on some filesystem, addressed by relative POSIX paths.

    Args:
        uri: a local path, or a URI that ``pyarrow.fs`` understands (``s3://``, ``gs://``,
            ``hdfs://``, ``file://``).

    Raises:
        StorageError: the URI is of an unknown kind or the filesystem refuses it.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        target = uri if "://" in uri else Path(uri).absolute().as_uri()
        try:
            self.filesystem, self.root = arrow_fs.FileSystem.from_uri(target)
        except (ArrowException, OSError, ValueError) as error:
            remedy = "Give a local folder or a URI such as s3://bucket/folder"
            raise StorageError(uri, f"not a usable location ({error})", remedy) from error

    def path(self, name: str) -> str:
        """Full path of ``name`` inside the filesystem."""
        return f"{self.root}/{name}" if name else self.root

    def exists(self, name: str) -> bool:
        """Whether a file or folder of that name exists."""
        with self._translated(name):
            info = self.filesystem.get_file_info(self.path(name))
            return bool(info.type != arrow_fs.FileType.NotFound)

    def read(self, name: str) -> bytes:
        """Whole content of a file.

        Raises:
            StorageError: it is missing or cannot be read.
        """
        with self._translated(name), self.filesystem.open_input_file(self.path(name)) as file:
            return cast(bytes, file.read())

    def write(self, name: str, content: bytes) -> None:
        """Replace a file's content at once.

        Raises:
            StorageError: the disk is full or the place is not writable; the old content stays.
        """
        with self.writer(name) as file:
            file.write(content)

    @contextlib.contextmanager
    def writer(self, name: str) -> Iterator[BinaryIO]:
        """Open a file for writing that appears under ``name`` only when the block succeeds."""
        target = PurePosixPath(self.path(name))
        temporary = f"{target.parent}/{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
        try:
            with self._translated(name):
                self.filesystem.create_dir(str(target.parent), recursive=True)
                with self.filesystem.open_output_stream(temporary) as file:
                    yield cast(BinaryIO, file)
                self.filesystem.move(temporary, str(target))
        except BaseException:
            # Best effort: the original error is what the user must see.
            with contextlib.suppress(OSError):
                self.filesystem.delete_file(temporary)
            raise

    def names(self, folder: str) -> list[str]:
        """Sorted names directly inside ``folder``; empty when the folder does not exist."""
        with self._translated(folder):
            selector = arrow_fs.FileSelector(self.path(folder), allow_not_found=True)
            infos = self.filesystem.get_file_info(selector)
        names = (info.base_name for info in infos)
        return sorted(name for name in names if not name.startswith(TEMPORARY_PREFIX))

    def rename(self, old: str, new: str) -> None:
        """Rename a file or folder; ``new`` must not exist."""
        with self._translated(old):
            self.filesystem.move(self.path(old), self.path(new))

    def delete_folder(self, name: str) -> None:
        """Delete a folder with its content; no error when it does not exist."""
        with self._translated(name):
            if self.exists(name):
                self.filesystem.delete_dir(self.path(name))

    @contextlib.contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ArrowException) as error:
            raise _storage_error(f"{self.uri}/{name}".rstrip("/"), error) from error


def _storage_error(path: str, error: Exception) -> StorageError:
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        return StorageError(path, "no space left on the device", "Free space or move the run")
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(path, "not permitted", "Give a folder that you may write to")
    if isinstance(error, FileNotFoundError):
        return StorageError(path, "does not exist", "Check the path")
    if isinstance(error, NotADirectoryError | FileExistsError) or number == errno.ENOTDIR:
        return StorageError(path, "a file is where a folder is needed", "Give another folder")
    return StorageError(path, str(error), "")
