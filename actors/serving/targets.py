"""QoE targets of an HTTP request: from its body, its headers, its key and the model's default.

The body's ``vllm_xargs`` win over the headers; both end up in ``vllm_xargs``, which is what a stock
engine hands to its scheduler. What a client must not set (the tenant and weight of its key, and
the policy switch) is overwritten or removed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from actors.andes.engine_settings import POLICY_FIELD, ROUTER_FIELD
from actors.serving.admission import ApiKey
from actors.serving.config import ServingConfig
from raysys.errors import ConfigError
from raysys.serving.andes.spec import FIELD_PREFIX, QoESpec, default_ttft_s, spec_from_fields

HEADERS = {
    "x-qoe-ttft-s": "qoe_ttft_s",
    "x-qoe-tds": "qoe_tds",
    "x-qoe-weight": "qoe_weight",
    "x-qoe-tenant": "qoe_tenant",
    "x-qoe-kind": "qoe_kind",
}
NUMBERS = ("qoe_ttft_s", "qoe_tds", "qoe_weight")
ANONYMOUS = "anonymous"


def merge_targets(
    fields: Mapping[str, Any] | None,
    headers: Mapping[str, str],
    key: ApiKey | None,
    settings: ServingConfig,
) -> tuple[dict[str, Any], QoESpec]:
    """Merge and check a request's targets.

    Args:
        fields: ``vllm_xargs`` of the body.
        headers: HTTP headers, names in lower case.
        key: the API key of the client, or None on an open endpoint.
        settings: the endpoint's defaults, and which switches clients may use.

    Returns:
        The ``vllm_xargs`` to send on, and the targets (a TTFT that nobody told is the paper's
        default for a short prompt; the scheduler, which knows the prompt, decides for itself).

    Raises:
        ConfigError: names the ``qoe_*`` field that is wrong.
    """
    config = settings.engine_andes
    merged: dict[str, Any] = {
        name: headers[header] for header, name in HEADERS.items() if headers.get(header) is not None
    }
    merged.update(fields or {})
    for name, value in merged.items():
        check_sendable(name, value)
    default = QoESpec(
        ttft_s=default_ttft_s(0) if config.default_ttft_s is None else config.default_ttft_s,
        tds=config.default_tds,
    )
    spec = spec_from_fields(merged, default, allow_text=True)
    if key is not None:
        merged["qoe_tenant"] = key.tenant
        merged["qoe_weight"] = (
            min(spec.weight, key.weight) if "qoe_weight" in merged else key.weight
        )
        spec = spec_from_fields(merged, default, allow_text=True)
    if not config.switchable:
        merged.pop(POLICY_FIELD, None)
    if not settings.fleet.switchable:
        merged.pop(ROUTER_FIELD, None)
    for name in NUMBERS:
        if name in merged:
            merged[name] = getattr(spec, name.removeprefix(FIELD_PREFIX))
    return merged, spec


def check_sendable(name: str, value: Any) -> None:
    """Check that an engine, a process of its own, can be sent a field.

    Raises:
        ConfigError: an integer beyond 64 bits, or text with lone surrogates.
    """
    for part in [name, *(value if isinstance(value, list) else [value])]:
        if isinstance(part, int) and not -(2**63) <= part < 2**63:
            raise ConfigError(name, part, "an integer of 64 bits")
        if isinstance(part, str):
            try:
                part.encode()
            except UnicodeEncodeError:
                raise ConfigError(name, part, "text without lone surrogates") from None
