"""What the serving side hands to the scheduler inside the engine process, and back.

Settings travel in vLLM's ``additional_config``; the scheduler's status comes back through a small
JSON file on the node, because nothing else of a stock engine carries it. No vLLM import here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raysys.config import check_range, config_from_dict, config_to_dict
from raysys.serving.andes.scheduler import AndesConfig
from raysys.serving.andes.spec import MAX_TDS, MAX_TTFT_S

SCHEDULER_CLASS = "actors.andes.vllm_scheduler.AndesVllmScheduler"
KEY = "andes"
POLICY_FIELD = "andes_policy"


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
        status_file: where the scheduler writes its status twice a second; None writes none.
    """

    scheduler: AndesConfig = field(default_factory=AndesConfig)
    default_ttft_s: float | None = None
    default_tds: float = 4.8
    switchable: bool = False
    force_untested: bool = False
    status_file: str | None = None

    def __post_init__(self) -> None:
        check_range(self, "default_tds", 0.0, MAX_TDS, low_open=True)
        if self.default_ttft_s is not None:
            check_range(self, "default_ttft_s", 0.0, MAX_TTFT_S)


def engine_arguments(config: AndesEngineConfig) -> dict[str, Any]:
    """vLLM engine arguments that load the scheduler with this configuration."""
    return {
        "scheduler_cls": SCHEDULER_CLASS,
        "additional_config": {KEY: config_to_dict(config)},
    }


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
