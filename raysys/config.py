"""Typed configuration: frozen dataclasses, filled from a YAML file and ``--set a.b=value``.

A component's config is a ``@dataclass(frozen=True, kw_only=True, slots=True)`` whose
``__post_init__`` calls the ``check_*`` functions of this module; a job's config contains the
configs of its components. :func:`load_config` turns outside data into such an object, once, and
every error is a :class:`~raysys.errors.ConfigError` with the dotted path of the field.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from raysys.errors import ConfigError, StorageError

ConfigT = TypeVar("ConfigT")


def load_config(
    cls: type[ConfigT], path: str | Path | None = None, overrides: Sequence[str] = ()
) -> ConfigT:
    """Build a ``cls`` from a YAML file and command-line overrides; the later one wins.

    Args:
        cls: a config dataclass, possibly with nested config dataclasses.
        path: YAML file whose top level is a mapping; ``None`` means "defaults only".
        overrides: strings ``"a.b=value"``; the value is read as YAML, so ``x=null`` and
            ``x=[1, 2]`` work.

    Raises:
        ConfigError: unknown field, wrong type, value out of range, or malformed YAML.
        StorageError: the file cannot be read.
    """
    values = _read_yaml(Path(path)) if path is not None else {}
    for override in overrides:
        _apply_override(values, override)
    return config_from_dict(cls, values)


def config_from_dict(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Build a ``cls`` from nested plain values, rejecting unknown fields.

    Raises:
        ConfigError: names the dotted field, the value, what is allowed and a remedy.
    """
    _check_fields(cls, values, "")
    try:
        return _adapter(cls).validate_python(dict(values))
    except ValidationError as error:
        raise _translate(error) from None
    except ConfigError as error:
        raise _with_path(cls, values, error) from None


def config_to_dict(config: Any) -> dict[str, Any]:
    """Return a config as nested plain values (JSON-ready for the types that configs use)."""
    plain = _adapter(type(config)).dump_python(config, mode="json")
    assert isinstance(plain, dict)
    return plain


def check_range(
    config: Any,
    field: str,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    low_open: bool = False,
    high_open: bool = False,
) -> None:
    """Check that a numeric field is finite and inside an interval; open ends exclude the bound.

    Raises:
        ConfigError: the value is NaN, infinite, or outside.
    """
    value = getattr(config, field)
    above = value > low if low_open else value >= low
    below = value < high if high_open else value <= high
    if not (math.isfinite(value) and above and below):
        raise ConfigError(field, value, _interval(low, high, low_open, high_open))


def check_choice(config: Any, field: str, choices: Collection[Any]) -> None:
    """Check that a field is one of ``choices``.

    Raises:
        ConfigError: it is not; the message lists the choices and the nearest one.
    """
    value = getattr(config, field)
    if value not in choices:
        listed = "one of " + ", ".join(repr(choice) for choice in choices)
        raise ConfigError(field, value, listed, _did_you_mean(str(value), map(str, choices)))


def check(config: Any, field: str, condition: bool, expected: str, remedy: str = "") -> None:
    """Raise a :class:`ConfigError` about ``field`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(field, getattr(config, field), expected, remedy)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(str(path), reason, "Give an existing file to --config") from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = str(error).replace("\n", " ")
        raise ConfigError(str(path), where, "well-formed YAML", "Check the indentation") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(str(path), values, "a YAML mapping of field: value")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise ConfigError("--set", override, "the form a.b=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {path}", text, "a YAML value") from None
    section = values
    for depth, key in enumerate(keys[:-1]):
        inner = section.setdefault(key, {})
        if not isinstance(inner, dict):
            outer = ".".join(keys[: depth + 1])
            raise ConfigError(f"--set {path}", value, f"{outer} to be a section, not a value")
        section = inner
    section[keys[-1]] = value


def _check_fields(cls: Any, values: Any, prefix: str) -> None:
    """Reject unknown keys with the full path and the nearest known name."""
    if not dataclasses.is_dataclass(cls) or not isinstance(values, Mapping):
        return
    nested = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    for key, value in values.items():
        if key not in names:
            known = "one of the fields " + ", ".join(names)
            raise ConfigError(f"{prefix}{key}", value, known, _did_you_mean(str(key), names))
        for inner in _alternatives(nested[key]):
            _check_fields(inner, value, f"{prefix}{key}.")


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _adapter(cls: type[ConfigT]) -> TypeAdapter[ConfigT]:
    if dataclasses.is_dataclass(cls):
        return TypeAdapter(cls)
    return TypeAdapter(cls, config=ConfigDict(extra="forbid"))


def _translate(error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Input should be ").rstrip(".")
    return ConfigError(field, first["input"], message)


def _with_path(cls: Any, values: Any, error: ConfigError) -> ConfigError:
    """Add the section's path to an error that a nested ``__post_init__`` raised."""
    paths = _paths_of_field(cls, values, error, "")
    field = paths[0] if len(paths) == 1 else error.field
    return ConfigError(field, error.value, error.expected, error.remedy)


def _paths_of_field(cls: Any, values: Any, error: ConfigError, prefix: str) -> list[str]:
    if not dataclasses.is_dataclass(cls) or not isinstance(values, Mapping):
        return []
    given = values.get(error.field, _ABSENT)
    found = [f"{prefix}{error.field}"] if _same(given, error.value) else []
    for name, annotation in typing.get_type_hints(cls).items():
        for inner in _alternatives(annotation):
            found += _paths_of_field(inner, values.get(name), error, f"{prefix}{name}.")
    return found


_ABSENT = object()


def _same(given: Any, checked: Any) -> bool:
    """Whether ``checked`` came from ``given``, which may be text of a number, or NaN."""
    if isinstance(checked, float):
        with contextlib.suppress(TypeError, ValueError):
            return float(given) == checked or (math.isnan(float(given)) and math.isnan(checked))
        return False
    if isinstance(checked, tuple) and isinstance(given, list):
        return tuple(given) == checked
    return bool(given == checked)


def _interval(low: float, high: float, low_open: bool, high_open: bool) -> str:
    if high == math.inf:
        return f"a finite number {'>' if low_open else '>='} {low:g}"
    if low == -math.inf:
        return f"a finite number {'<' if high_open else '<='} {high:g}"
    return f"a number in {'(' if low_open else '['}{low:g}, {high:g}{')' if high_open else ']'}"


def _did_you_mean(word: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"Did you mean {close[0]!r}?" if close else ""
