"""Every error that raysys raises on purpose.

RaysysError                     base: catch this to catch them all        exit code 1
├── ConfigError                 a value that we were given is wrong        exit code 2
├── CapabilityError             this machine lacks something               exit code 3
├── InfeasibleError             a valid request that cannot be met         exit code 4
├── RemoteError                 a process, cluster or network peer failed  exit code 5
├── StorageError                a file or directory cannot be used         exit code 6
│   └── DataError               a file was read, but its content is wrong  exit code 6
└── InterruptedRunError         the user or the platform asked us to stop  exit code 130

Errors cross process borders, so every argument goes positionally to ``super().__init__`` and the
text is built in ``__str__``: pickling then rebuilds the same error and never doubles the message.
"""

from __future__ import annotations

from typing import Any, ClassVar


class RaysysError(Exception):
    """Base of all deliberate errors; ``exit_code`` is what a job's process exits with."""

    exit_code: ClassVar[int] = 1


class ConfigError(RaysysError):
    """A configuration or argument value is wrong.

    Args:
        field: dotted path of the field, such as ``"trainer.lr"``.
        value: the value that was given.
        expected: the allowed type or range, in words.
        remedy: what the user can do about it; may be empty.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, field: str, value: Any, expected: str, remedy: str = "") -> None:
        super().__init__(field, value, expected, remedy)
        self.field = field
        self.value = value
        self.expected = expected
        self.remedy = remedy

    def __str__(self) -> str:
        text = f"{self.field}: expected {self.expected}, got {shorten(self.value)}"
        return f"{text}. {self.remedy}" if self.remedy else text


class CapabilityError(RaysysError):
    """This machine or environment lacks something that the request needs.

    Args:
        capability: what is missing, such as ``"vLLM"``.
        reason: how we know.
        remedy: how to get it.
    """

    exit_code: ClassVar[int] = 3

    def __init__(self, capability: str, reason: str, remedy: str) -> None:
        super().__init__(capability, reason, remedy)
        self.capability = capability
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.capability} is not available: {self.reason}. {self.remedy}"


class InfeasibleError(RaysysError):
    """A well-formed request that cannot be met, such as a budget below the fixed costs."""

    exit_code: ClassVar[int] = 4

    def __init__(self, request: str, reason: str, remedy: str = "") -> None:
        super().__init__(request, reason, remedy)
        self.request = request
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        text = f"{self.request} is not possible: {self.reason}"
        return f"{text}. {self.remedy}" if self.remedy else text


class RemoteError(RaysysError):
    """Another process, a cluster or a network peer failed or cannot be reached."""

    exit_code: ClassVar[int] = 5

    def __init__(self, peer: str, reason: str, remedy: str = "") -> None:
        super().__init__(peer, reason, remedy)
        self.peer = peer
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        text = f"{self.peer}: {self.reason}"
        return f"{text}. {self.remedy}" if self.remedy else text


class StorageError(RaysysError):
    """A file or directory cannot be read or written (missing, full, refused)."""

    exit_code: ClassVar[int] = 6

    def __init__(self, path: str, reason: str, remedy: str = "") -> None:
        super().__init__(path, reason, remedy)
        self.path = path
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        text = f"{self.path}: {self.reason}"
        return f"{text}. {self.remedy}" if self.remedy else text


class DataError(StorageError):
    """A file was read but what it holds is damaged, of another version, or of the wrong kind."""


class InterruptedRunError(RaysysError):
    """The run was asked to stop (Ctrl-C or SIGTERM) and did so cleanly."""

    exit_code: ClassVar[int] = 130

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"stopped: {self.reason}"


def shorten(value: Any, limit: int = 80) -> str:
    """Return ``repr(value)``, cut in the middle to at most ``limit`` characters."""
    text = repr(value)
    if len(text) <= limit:
        return text
    half = (limit - 3) // 2
    return f"{text[:half]}...{text[-half:]}"
