"""Secrets in configurations: given as files, kept out of manifests.

A field that holds a secret is declared with ``field(default="", repr=False, metadata=SECRET)``. Its
value is the secret, or ``file:PATH`` of a file that holds it; only the latter survives in a
manifest, so that a run with secrets can be resumed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from raysys.config import config_to_dict
from raysys.errors import ConfigError, StorageError

SECRET: Mapping[str, Any] = MappingProxyType({"secret": True})
HIDDEN = "(hidden)"
_FILE = "file:"


def concealed(config: Any) -> dict[str, Any]:
    """A config as nested plain values for a manifest, without the secrets that it holds."""
    plain = config_to_dict(config)
    _conceal(config, plain)
    return plain


def revealed(value: str, field: str) -> str:
    """The secret that a field's value stands for.

    Raises:
        StorageError: its file cannot be read.
        ConfigError: the value comes from a manifest, which keeps no secrets.
    """
    if value == HIDDEN:
        remedy = f"A manifest keeps no secrets: start with {field}={_FILE}PATH, which it does keep"
        raise ConfigError(field, HIDDEN, f"the secret or {_FILE}PATH", remedy)
    if not value.startswith(_FILE):
        return value
    path = value.removeprefix(_FILE)
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(path, str(error), f"Check {field}") from error


def _conceal(config: Any, plain: dict[str, Any]) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.metadata.get("secret") and value and not value.startswith(_FILE):
            plain[field.name] = HIDDEN
        elif dataclasses.is_dataclass(value):
            _conceal(value, plain[field.name])
