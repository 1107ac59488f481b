"""The file that keeps two engines of one host apart."""

from __future__ import annotations

import fcntl
import os

from raysys.errors import InfeasibleError


def take_lock(path: str) -> int | None:
    """Descriptor of the locked file, or None without a path.

    Raises:
        InfeasibleError: another process holds it.
    """
    if not path:
        return None
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise InfeasibleError(
            "a second engine", f"another process trains under {path}", "Wait, or stop that one"
        ) from error
    return descriptor
