"""What the serving side hands to the scheduler inside the engine process, and back.

Settings travel in vLLM's ``additional_config``; the scheduler's status comes back through a small
JSON file on the node, because nothing else of a stock engine carries it. No vLLM import here.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from raysys.config import check, check_range, config_from_dict, config_to_dict
from raysys.errors import RemoteError
from raysys.serving.andes.scheduler import AndesConfig
from raysys.serving.andes.spec import MAX_TDS, MAX_TTFT_S

SCHEDULER_CLASS = "actors.andes.vllm_scheduler.AndesVllmScheduler"
KEY = "andes"
POLICY_FIELD = "andes_policy"
ROUTER_FIELD = "andes_router"


@dataclass(frozen=True, kw_only=True, slots=True)
class AndesEngineConfig:
    """Andes inside one engine.

    Args:
        scheduler: policy, planner, controller, latency model.
        default_ttft_s: expected time to first token of requests that tell none; None takes the
            paper's ``max(1, prompt_tokens / 5000)``.
        default_tds: expected tokens/s of requests that tell none.
        switchable: obey the request field ``andes_policy`` (demonstrations and benchmarks that
            compare policies on one engine); never for a public endpoint.
        force_untested: start on a vLLM that the adapter was not tested with.
        status_file: where the scheduler writes its status four times a second. Behind Ray Serve
            each replica takes a file of its own: None a temporary one, and further replicas on a
            node append their number to a name that is given.
        step_log: JSON lines, one a step, for ``raysys calibrate``; None writes none.
        decision_log: JSON lines, one a triggered plan with all its inputs, to replay with
            :mod:`raysys.serving.andes.decisions`; large; None writes none.
        slowdowns: for studies of unequal machines: replica number i makes its steps so many times
            as long, by sleeping; 1 where the list ends.
        slowdown: this engine's own factor, filled in from ``slowdowns``.
    """

    scheduler: AndesConfig = field(default_factory=AndesConfig)
    default_ttft_s: float | None = None
    default_tds: float = 4.8
    switchable: bool = False
    force_untested: bool = False
    status_file: str | None = None
    step_log: str | None = None
    decision_log: str | None = None
    slowdowns: tuple[float, ...] = ()
    slowdown: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, "slowdown", 1.0, 100.0)
        fine = all(1.0 <= factor <= 100.0 for factor in self.slowdowns)
        check(self, "slowdowns", fine, "factors of 1 to 100")
        check_range(self, "default_tds", 0.0, MAX_TDS, low_open=True)
        if self.default_ttft_s is not None:
            check_range(self, "default_ttft_s", 0.0, MAX_TTFT_S)


def engine_arguments(config: AndesEngineConfig) -> dict[str, Any]:
    """vLLM engine arguments that load the scheduler with this configuration."""
    return {
        "scheduler_cls": SCHEDULER_CLASS,
        "additional_config": {KEY: config_to_dict(config)},
    }


def for_replica(config: AndesEngineConfig, number: int, default_status: str) -> AndesEngineConfig:
    """The settings of replica ``number`` on its node: files and slowdown of its own."""
    suffix = f".{number}" if number else ""

    def own(path: str | None) -> str | None:
        return f"{path}{suffix}" if path else None

    slow = config.slowdowns[number] if number < len(config.slowdowns) else config.slowdown
    return replace(
        config,
        status_file=own(config.status_file) or default_status,
        step_log=own(config.step_log),
        decision_log=own(config.decision_log),
        slowdown=slow,
    )


def read_arguments(additional_config: Any) -> AndesEngineConfig:
    """The configuration as it arrived in the engine process; defaults where there is none.

    Raises:
        ConfigError: a field is unknown or out of range.
    """
    values = additional_config.get(KEY, {}) if isinstance(additional_config, Mapping) else {}
    return config_from_dict(AndesEngineConfig, values)


def write_status(path: Path, status: Mapping[str, Any]) -> None:
    """Replace the status file in one step, so that a reader never sees half of it."""
    partial = path.with_name(f".{path.name}-{os.getpid()}")
    partial.write_text(json.dumps(status), encoding="utf-8")
    os.replace(partial, path)


def read_status(path: Path) -> dict[str, Any] | None:
    """The last status, or None before the first one."""
    try:
        status = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return status if isinstance(status, dict) else None


def idle_status(path: Path, patience_s: float = 10.0) -> dict[str, Any]:
    """The scheduler's status once nothing runs or waits; it is written four times a second.

    Raises:
        RemoteError: there is none in time.
    """
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        status = read_status(path)
        if status is not None and status["running"] == status["waiting"] == 0:
            return status
        time.sleep(0.1)
    raise RemoteError("serving engine", "its scheduler wrote no status", "See the Ray Serve logs")
