"""The simulated machine: its sizes, and the totals of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

from raysys.config import check, check_range
from raysys.serving.andes.models import StepTime


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """The simulated machine.

    Args:
        step_time: true step time; the planner learns its own model.
        kv_tokens: KV room M.
        block_tokens: tokens per KV block.
        max_batch: most sequences at once.
        step_tokens: most tokens computed per step.
        chunked: chunked prefill beside decodes; False gives prefill steps of whole prompts that
            stall all decodes (the older vLLM default).
        prefix_cache: freed blocks stay readable until reused.
        restore_fraction: cost of restoring a paused request's KV relative to recomputing it; 1 is
            recompute only, 0.1 a host tier.
        prefix_room: prompt-prefix ids remembered, for traces that carry them.
    """

    step_time: StepTime = field(default_factory=StepTime)
    kv_tokens: int = 30_000
    block_tokens: int = 16
    max_batch: int = 1024
    step_tokens: int = 2048
    chunked: bool = True
    prefix_cache: bool = True
    restore_fraction: float = 1.0
    prefix_room: int = 0

    def __post_init__(self) -> None:
        check_range(self, "kv_tokens", 1)
        check_range(self, "block_tokens", 1)
        check_range(self, "max_batch", 1)
        check_range(self, "step_tokens", 1)
        check_range(self, "restore_fraction", 0.0, 1.0)
        check_range(self, "prefix_room", 0)
        check(self, "kv_tokens", self.kv_tokens >= self.block_tokens, "at least one block")


@dataclass(slots=True)
class SimStats:
    """Totals of a run."""

    steps: int = 0
    busy_s: float = 0.0
    prefill_tokens: int = 0
    restored_tokens: float = 0.0
    pauses: int = 0
    evictions: int = 0
    peak_waiting: int = 0
