"""Fuzzes an OpenAPI endpoint from its own schema with schemathesis."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

# Engines answer these in their own time; the schema is what is tested, not patience.
SHORT = {"max_tokens": 2, "max_completion_tokens": 2, "min_tokens": 0, "n": 1}


@dataclass(slots=True)
class FuzzReport:
    """What was sent and what came back.

    Args:
        operations: routes of the schema that were called.
        calls: requests in all.
        statuses: how often each status came.
        failures: one text for each answer of 500 or more.
    """

    operations: int = 0
    calls: int = 0
    statuses: dict[int, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


def fuzz(
    url: str, key: str, model: str, *, examples: int, entropy: int | None = None
) -> FuzzReport:
    """Call every operation of ``url``'s schema with bodies that fit it and bodies that do not.

    Half of the bodies get the real model and a short answer, so that they go all the way into the
    engine; those without a model go there too and are short. The others keep whatever was
    generated. Without ``entropy`` the bodies are the same in
    every run; a number gives others, the same for the same number.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the schema is the engine's; its quirks are not ours
        import schemathesis

        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        # A burst that fits the schema may keep an engine busy for minutes.
        # An engine on a busy machine may need far longer than the library's ten seconds.
        chosen = schema.exclude(path="/qoe/bursts")
        return _fuzz(chosen, key, model, examples, entropy, timeout=300)


def fuzz_app(app: Any, model: str, *, examples: int, entropy: int | None = None) -> FuzzReport:
    """The same with an ASGI application in this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import schemathesis

        schema = schemathesis.openapi.from_asgi("/openapi.json", app)
        return _fuzz(schema, "", model, examples, entropy)


def _fuzz(
    schema: Any, key: str, model: str, examples: int, entropy: int | None, **options: Any
) -> FuzzReport:
    from schemathesis import GenerationMode

    report = FuzzReport()
    for result in schema.get_all_operations():
        operation = result.ok()
        report.operations += 1
        for mode in GenerationMode:
            strategy = operation.as_strategy(generation_mode=mode)
            _run(report, strategy, key, model, examples, entropy, options)
    return report


def _run(
    report: FuzzReport,
    strategy: Any,
    key: str,
    model: str,
    examples: int,
    entropy: int | None,
    options: dict[str, Any],
) -> None:
    @settings(
        max_examples=examples,
        database=None,
        derandomize=entropy is None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy, real=st.booleans())
    def call(case: Any, real: bool) -> None:
        if isinstance(case.body, dict) and (real or case.body.get("model") is None):
            case.body = {**case.body, **SHORT, **({"model": model} if real else {})}
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        response = case.call(headers=headers, **options)
        report.calls += 1
        status = response.status_code
        report.statuses[status] = report.statuses.get(status, 0) + 1
        if status >= 500:
            report.failures.append(
                f"{case.method} {case.path}: {status} {response.text[:300]} for {case.body!r:.600}"
            )

    if entropy is not None:
        call = seed(entropy)(call)
    # A route without parameters has nothing that could be wrong.
    with contextlib.suppress(Unsatisfiable):
        call()
