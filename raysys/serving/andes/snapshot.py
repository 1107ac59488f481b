"""What the planner sees and what it answers: plain arrays, frozen, without ids or engine objects.

A caller (the vLLM adapter, the simulator) numbers its live requests 0..N-1, fills a
:class:`Snapshot` in that order, and reads the :class:`Plan`'s index arrays in the same order.
:class:`RequestTable` in ``table.py`` builds snapshots from slots that are updated in O(1).

Shapes: N requests. Times are seconds, sizes are tokens of KV cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from raysys.errors import ConfigError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

Mode = Literal["full", "admission_only", "fcfs"]
MODES: tuple[Mode, ...] = ("full", "admission_only", "fcfs")

_FLOAT_FIELDS = (
    "elapsed_s", "tokens", "lag_s", "delay_sum_s", "ttft_s", "tau_s", "weight",
    "context_tokens", "missing_tokens", "unserved_s",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """The engine between two steps.

    Args:
        now_s: the caller's clock; only differences matter.
        capacity_tokens: KV room of the engine, M.
        free_tokens: KV room that nobody running holds (reclaimable prefix cache counts as free).
        max_batch: most sequences the engine runs at once.
        step_tokens: most tokens the engine computes in one step (chunked prefill budget).
        running: (N,) bool, holds KV and takes part in steps; all others wait or are paused.
        pausable: (N,) bool, running and free to be paused now: not in prefill, not scheduled in a
            step under way, not finished. Ignored where not running.
        elapsed_s: (N,) seconds since the user submitted.
        tokens: (N,) visible tokens delivered.
        lag_s, delay_sum_s: (N,) the QoE tracker's state.
        ttft_s, tau_s, weight: (N,) targets D, tau = 1 / tds, and the tenant weight.
        context_tokens: (N,) KV the request needs when it runs: prompt + generated.
        missing_tokens: (N,) tokens to compute before its next token; 0 for a running decoder. A
            cheap restore (host tier, prefix hits) is stated by a smaller number here.
        unserved_s: (N,) seconds since it last ran, or since submission; 0 while running.
        preemptions: (N,) how often it was paused.
    """

    now_s: float
    capacity_tokens: float
    free_tokens: float
    max_batch: int
    step_tokens: int
    running: BoolArray
    pausable: BoolArray
    elapsed_s: FloatArray
    tokens: FloatArray
    lag_s: FloatArray
    delay_sum_s: FloatArray
    ttft_s: FloatArray
    tau_s: FloatArray
    weight: FloatArray
    context_tokens: FloatArray
    missing_tokens: FloatArray
    unserved_s: FloatArray
    preemptions: IntArray

    @property
    def size(self) -> int:
        return int(self.running.size)

    def validate(self) -> None:
        """Check shapes and finiteness; for adapters' tests and debug runs, not for every step.

        Raises:
            ConfigError: names the array.
        """
        for name in (*_FLOAT_FIELDS, "running", "pausable", "preemptions"):
            array = getattr(self, name)
            if array.shape != (self.size,):
                raise ConfigError(f"snapshot.{name}", array.shape, f"shape ({self.size},)")
            if name in _FLOAT_FIELDS and not np.isfinite(array).all():
                raise ConfigError(f"snapshot.{name}", "NaN or infinite", "finite numbers")
        if self.size and ((self.tau_s <= 0).any() or (self.context_tokens <= 0).any()):
            raise ConfigError("snapshot.tau_s", "<= 0", "positive tau_s and context_tokens")


def limit_speed(snapshot: Snapshot, max_tds: float) -> Snapshot:
    """The snapshot with nobody reading faster than ``max_tds`` tokens/s.

    A slower reader is as far behind at most as a fast one: its last token is consumed at the same
    time or as early as its own pace allows, so the lag shrinks by what the slower ideal line is
    later, and the delay sum can be at most that lag for every token.
    """
    tau_s = 1.0 / max_tds
    if not (snapshot.tau_s < tau_s).any():
        return snapshot
    tau_N = np.maximum(snapshot.tau_s, tau_s)
    read_N = np.maximum(0.0, snapshot.tokens - 1.0)
    lag_N = np.maximum(0.0, snapshot.lag_s - read_N * (tau_N - snapshot.tau_s))
    delay_N = np.minimum(snapshot.delay_sum_s, snapshot.tokens * lag_N)
    return replace(snapshot, tau_s=tau_N, lag_s=lag_N, delay_sum_s=delay_N)


def _empty() -> IntArray:
    return np.empty(0, dtype=np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What to do before the next step. Index arrays point into the snapshot.

    Args:
        pause: running requests to pause now, fullest reader buffer first.
        admit: waiting or paused requests to admit now, best first; room for them is counted.
        hold: the other waiting requests, best first: the order to use if room turns up before the
            next plan.
        batch_cap: most requests to run until the next plan.
        mode: the mode this plan was made in.
        triggered: False where nothing was short and the plan is "admit what fits".
        batch: the batch size whose packing won; 0 if not triggered.
        gain: predicted QoE gain of the accepted swaps.
        loss: QoE that all other requests lose by the swaps' restore time, already below ``gain``.
        starved: requests that the starvation guard put first.
        reason: why it looks this way, for the decision log.
    """

    pause: IntArray = field(default_factory=_empty)
    admit: IntArray = field(default_factory=_empty)
    hold: IntArray = field(default_factory=_empty)
    batch_cap: int
    mode: Mode
    triggered: bool = False
    batch: int = 0
    gain: float = 0.0
    loss: float = 0.0
    starved: int = 0
    reason: str = ""
