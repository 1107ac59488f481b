"""Live requests as columns: O(1) updates per event, one fancy-indexing per snapshot.

Both the simulator and an engine adapter keep their requests here, so that 5,000 of them can be
handed to the planner without touching 5,000 Python objects.
"""

from __future__ import annotations

import numpy as np

from raysys.errors import ConfigError
from raysys.serving.andes.snapshot import BoolArray, FloatArray, IntArray, Snapshot
from raysys.serving.andes.spec import QoESpec

_FLOATS = (
    "submitted_s", "tokens", "lag_s", "delay_sum_s", "ttft_s", "tau_s", "weight",
    "context_tokens", "missing_tokens", "served_s",
)  # fmt: skip


class RequestTable:
    """Slots of live requests. A slot is valid from :meth:`add` to :meth:`remove`.

    Columns are public numpy arrays indexed by slot: the caller sets ``running``, ``pausable``,
    ``context_tokens``, ``missing_tokens``, ``served_s`` (when it last ran) and ``preemptions``;
    the QoE state is kept by :meth:`deliver`. Columns are replaced when the table grows, so read
    them from the table each time.
    """

    submitted_s: FloatArray
    tokens: FloatArray
    lag_s: FloatArray
    delay_sum_s: FloatArray
    ttft_s: FloatArray
    tau_s: FloatArray
    weight: FloatArray
    context_tokens: FloatArray
    missing_tokens: FloatArray
    served_s: FloatArray
    running: BoolArray
    pausable: BoolArray
    preemptions: IntArray

    def __init__(self, room: int = 64) -> None:
        if room < 1:
            raise ConfigError("room", room, "at least 1")
        for name in _FLOATS:
            setattr(self, name, np.zeros(room))
        self.running = np.zeros(room, dtype=np.bool_)
        self.pausable = np.zeros(room, dtype=np.bool_)
        self.preemptions = np.zeros(room, dtype=np.int64)
        self._free = list(range(room - 1, -1, -1))
        self._live: dict[int, None] = {}

    def __len__(self) -> int:
        return len(self._live)

    def add(self, spec: QoESpec, submitted_s: float, prompt_tokens: int) -> int:
        """Take a slot for a new, waiting request; all of its prompt is missing."""
        if not self._free:
            self._grow()
        slot = self._free.pop()
        for name in _FLOATS:
            getattr(self, name)[slot] = 0.0
        self.submitted_s[slot] = self.served_s[slot] = submitted_s
        self.ttft_s[slot], self.tau_s[slot] = spec.ttft_s, spec.tau_s
        self.weight[slot] = spec.weight
        self.context_tokens[slot] = self.missing_tokens[slot] = prompt_tokens
        self.running[slot] = self.pausable[slot] = False
        self.preemptions[slot] = 0
        self._live[slot] = None
        return slot

    def remove(self, slot: int) -> None:
        """Give a slot back; a second call is an error of the caller.

        Raises:
            ConfigError: the slot is not in use.
        """
        if slot not in self._live:
            raise ConfigError("slot", slot, "a slot in use")
        del self._live[slot]
        self.running[slot] = False
        self._free.append(slot)

    def deliver(self, slots: IntArray, now_s: float) -> None:
        """One visible token for each slot at ``now_s``; QoE state only."""
        n = self.tokens[slots]
        since = now_s - self.submitted_s[slots]
        lag = np.maximum(self.lag_s[slots], since - self.ttft_s[slots] - n * self.tau_s[slots])
        self.lag_s[slots] = lag
        self.delay_sum_s[slots] += lag
        self.tokens[slots] = n + 1.0

    def deliver_chunk(self, slot: int, now_s: float, k: int = 1) -> None:
        """``k`` visible tokens for one slot at ``now_s``: O(1), all share the time."""
        if k <= 0:
            return
        n, tau = self.tokens[slot], self.tau_s[slot]
        since = now_s - self.submitted_s[slot]
        lag = max(self.lag_s[slot], since - self.ttft_s[slot] - n * tau)
        self.lag_s[slot] = lag
        self.delay_sum_s[slot] += k * lag
        self.tokens[slot] = n + k

    def live_slots(self) -> IntArray:
        """Slots in use, in order of arrival."""
        return np.fromiter(self._live, dtype=np.int64, count=len(self._live))

    def snapshot(
        self,
        now_s: float,
        slots: IntArray,
        *,
        capacity_tokens: float,
        free_tokens: float,
        max_batch: int,
        step_tokens: int,
    ) -> Snapshot:
        """Copy the given slots' columns; index i of the snapshot is ``slots[i]``."""
        running = self.running[slots]
        unserved = np.where(running, 0.0, now_s - self.served_s[slots])
        return Snapshot(
            now_s=now_s,
            capacity_tokens=capacity_tokens,
            free_tokens=free_tokens,
            max_batch=max_batch,
            step_tokens=step_tokens,
            running=running,
            pausable=self.pausable[slots],
            elapsed_s=now_s - self.submitted_s[slots],
            tokens=self.tokens[slots],
            lag_s=self.lag_s[slots],
            delay_sum_s=self.delay_sum_s[slots],
            ttft_s=self.ttft_s[slots],
            tau_s=self.tau_s[slots],
            weight=self.weight[slots],
            context_tokens=self.context_tokens[slots],
            missing_tokens=self.missing_tokens[slots],
            unserved_s=unserved,
            preemptions=self.preemptions[slots],
        )

    def _grow(self) -> None:
        room = self.running.size
        for name in (*_FLOATS, "running", "pausable", "preemptions"):
            old = getattr(self, name)
            setattr(self, name, np.concatenate([old, np.zeros_like(old)]))
        self._free = list(range(2 * room - 1, room - 1, -1))
