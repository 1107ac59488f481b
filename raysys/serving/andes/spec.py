"""QoE targets of a request: how soon and how fast its reader expects the text.

Andes (Liu et al., arXiv 2404.16283), sections on the QoE metric and on workloads: a request carries
an expected time to first token and an expected token delivery speed. The reading and listening
classes below are the paper's tables by age and by language.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from raysys.errors import ConfigError

Kind = Literal["reading", "listening"]

MAX_TTFT_S = 3600.0
MAX_TDS = 1000.0
MAX_WEIGHT = 100.0
MAX_TENANT_LENGTH = 128

# Fields as they travel with a request (flat, because OpenAI-style extra fields are flat).
FIELD_PREFIX = "qoe_"
FIELDS = ("qoe_ttft_s", "qoe_tds", "qoe_weight", "qoe_tenant", "qoe_kind")


@dataclass(frozen=True, slots=True)
class QoESpec:
    """What one reader expects.

    Args:
        ttft_s: expected time to first token D in seconds, 0 to 3600.
        tds: expected token delivery speed r in tokens/s, above 0 and at most 1000.
        weight: multiplies the request's value for the planner, above 0 and at most 100.
        tenant: who is charged for it; None is the anonymous tenant.
        kind: ``"reading"`` or ``"listening"``; for reports only.

    Raises:
        ConfigError: names the field. Booleans, NaN and infinities are refused.
    """

    ttft_s: float = 1.0
    tds: float = 4.8
    weight: float = 1.0
    tenant: str | None = None
    kind: Kind = "reading"

    def __post_init__(self) -> None:
        _check_number("ttft_s", self.ttft_s, 0.0, MAX_TTFT_S, low_open=False)
        _check_number("tds", self.tds, 0.0, MAX_TDS, low_open=True)
        _check_number("weight", self.weight, 0.0, MAX_WEIGHT, low_open=True)
        if self.kind not in ("reading", "listening"):
            raise ConfigError("kind", self.kind, "'reading' or 'listening'")
        if self.tenant is not None and (
            not isinstance(self.tenant, str) or not 0 < len(self.tenant) <= MAX_TENANT_LENGTH
        ):
            raise ConfigError("tenant", self.tenant, f"a text of 1 to {MAX_TENANT_LENGTH} letters")

    @property
    def tau_s(self) -> float:
        """Seconds per token of the reader, 1 / tds."""
        return 1.0 / self.tds


@dataclass(frozen=True, slots=True)
class ReaderClass:
    """One row of the paper's tables: a group of readers, its share, its seconds per token."""

    name: str
    share: float
    tau_s: float
    kind: Kind


READING_CLASSES = (
    ReaderClass("18-24", 0.280, 0.196, "reading"),
    ReaderClass("25-44", 0.519, 0.230, "reading"),
    ReaderClass("45-54", 0.112, 0.240, "reading"),
    ReaderClass("55-64", 0.056, 0.249, "reading"),
    ReaderClass("65+", 0.033, 0.264, "reading"),
)


def default_ttft_s(prompt_tokens: int) -> float:
    """Expected TTFT where none is given: ``max(1, prompt_tokens / 5000)`` seconds (v2)."""
    return max(1.0, prompt_tokens / 5000.0)


def spec_from_fields(
    fields: Mapping[str, Any],
    default: QoESpec,
    *,
    allow_text: bool = False,
    strict: bool = True,
) -> QoESpec:
    """Build a spec from a request's ``qoe_*`` fields; what is missing comes from ``default``.

    Args:
        fields: flat mapping; keys without the ``qoe_`` prefix are ignored.
        allow_text: accept texts that parse as numbers (HTTP headers), else refuse them.
        strict: refuse unknown ``qoe_*`` keys; otherwise ignore them (see :func:`unknown_fields`).

    Raises:
        ConfigError: names the ``qoe_*`` field as the client wrote it.
    """
    unknown = unknown_fields(fields)
    if strict and unknown:
        raise ConfigError(unknown[0], fields[unknown[0]], "one of " + ", ".join(FIELDS))
    values: dict[str, Any] = {}
    for field in FIELDS:
        name = field.removeprefix(FIELD_PREFIX)
        value = fields.get(field)
        if value is None:
            values[name] = getattr(default, name)
        elif allow_text and isinstance(value, str) and name in ("ttft_s", "tds", "weight"):
            values[name] = _parse_number(field, value)
        else:
            values[name] = value
    try:
        return QoESpec(**values)
    except ConfigError as error:
        raise ConfigError(FIELD_PREFIX + error.field, error.value, error.expected) from None


def unknown_fields(fields: Mapping[str, Any]) -> list[str]:
    """Keys that start with ``qoe_`` and mean nothing, in order."""
    return [key for key in fields if key.startswith(FIELD_PREFIX) and key not in FIELDS]


def _parse_number(field: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(field, text, "a number") from None


def _check_number(field: str, value: Any, low: float, high: float, *, low_open: bool) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    inside = number and math.isfinite(value) and low <= value <= high
    if not inside or (low_open and value == low):
        bound = "(" if low_open else "["
        raise ConfigError(field, value, f"a number in {bound}{low:g}, {high:g}]")
