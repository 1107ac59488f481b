"""The refiner: pause and admit only where that gains more than the restores cost everybody.

Andes (arXiv 2404.16283), overhead-aware refiner: newcomers by priority, each with the smallest set
of victims that makes room, until the first swap that does not pay. Where we differ: a rejected swap
ends further pauses but not admissions into free room, and a shortage that the engine would solve by
evicting its newest request is solved by pausing a reader with enough unread text.
"""

from __future__ import annotations

import numpy as np

from raysys.serving.andes.options import shortage_tokens
from raysys.serving.andes.packing import pack
from raysys.serving.andes.snapshot import BoolArray, FloatArray, IntArray
from raysys.serving.andes.valuation import Valuation


class Refiner:
    """The refiner's running account: room, victims, restore seconds, gain and loss."""

    def __init__(
        self,
        values: Valuation,
        batch: int,
        value_N: FloatArray,
        gain_N: FloatArray,
        selected_N: BoolArray,
    ) -> None:
        s = values.snapshot
        self.values = values
        self.batch = batch
        self.value_N = value_N
        self.count = int(s.running.sum())
        grow = values.config.growth_tokens * self.count
        self.room = s.free_tokens - grow
        victims = np.flatnonzero(values.victim_N & ~selected_N)
        self.victims = list(victims[np.argsort(-values.buffer_N[victims], kind="stable")])
        self.pause: list[int] = []
        self.admit: list[int] = []
        self.stall_s = 0.0
        self.gain = 0.0
        self.loss = 0.0
        self.pausing = True
        self.reason = "packed"
        latency = float(values.step_time.predict(batch))
        self.stall_loss = values.stall_loss(latency) if values.config.refiner else None
        self.swap_gain_N = values.swap_gain(latency)
        self.restore_N = values.restore.cost(s.context_tokens)
        self.own_N = np.maximum(gain_N, 0.0) * s.weight

    def relieve_shortage(self) -> None:
        """The engine is about to evict its newest request: pause the fullest reader instead."""
        values, s = self.values, self.values.snapshot
        short = shortage_tokens(values.config, self.count) - s.free_tokens
        if short <= 0.0:
            return
        self.reason = "shortage"
        able_N = s.running & s.pausable
        safe_N = able_N & (values.buffer_N >= values.gate_N)
        while short > 0.0 and self.count > 1 and able_N.any():
            index = _best_fit(safe_N, values.size_N, short)
            if index is None:
                index = int(np.argmax(np.where(able_N, values.buffer_N, -np.inf)))
            able_N[index] = safe_N[index] = False
            self._evict(index)
            short -= float(values.size_N[index])
            if index in self.victims:
                self.victims.remove(index)

    def consider(self, index: int) -> None:
        """Admit a chosen newcomer if room can be made and the swap pays."""
        need = float(self.values.size_N[index])
        picked = self._smallest_set(need)
        if picked is None:
            return
        if picked:
            gain, loss, stall = self._account(index, picked)
            if gain <= loss and not self.values.starved_N[index]:
                self.pausing = False
                self.reason = "a swap would cost more than it gains"
                return
            self.gain += gain
            self.loss += loss
            self.stall_s += stall
            for victim in picked:
                self._evict(victim)
                self.victims.remove(victim)
        self._take(index)

    def fill(self, waiting: IntArray) -> None:
        """Room that is left goes to whoever fits, best first: idle memory serves nobody."""
        values = self.values
        able_N = values.waiting_N.copy()
        able_N[self.admit] = False
        count = min(max(self.batch, 1), values.snapshot.max_batch) - self.count
        size_N = values.size_N
        for index in pack(waiting, able_N.astype(np.float64), size_N, count, self.room):
            self._take(int(index))

    def _smallest_set(self, need: float) -> list[int] | None:
        """Victims, fullest first, that make room; None if room cannot be made."""
        room, count = self.room, self.count
        picked: list[int] = []
        for victim in self.victims:
            if room >= need and count < self.batch:
                break
            picked.append(int(victim))
            room += float(self.values.size_N[victim])
            count -= 1
        if room < need or count >= self.values.snapshot.max_batch:
            return None
        return picked if not picked or self.pausing else None

    def _account(self, index: int, picked: list[int]) -> tuple[float, float, float]:
        """Gain, loss and restore seconds of swapping ``picked`` for ``index``."""
        gain = float(self.swap_gain_N[index])
        if self.stall_loss is None:
            return gain, 0.0, 0.0
        own = sum(float(self.own_N[victim]) for victim in picked)
        stall = sum(float(self.restore_N[victim]) for victim in picked)
        before, after = self.stall_loss(self.stall_s), self.stall_loss(self.stall_s + stall)
        return gain, own + after - before, stall

    def _evict(self, victim: int) -> None:
        self.pause.append(victim)
        self.room += float(self.values.size_N[victim])
        self.count -= 1

    def _take(self, index: int) -> None:
        self.admit.append(index)
        self.room -= float(self.values.size_N[index])
        self.count += 1


def _best_fit(able_N: BoolArray, size_N: FloatArray, need: float) -> int | None:
    """The smallest that covers ``need``, else the largest: restoring costs by the token."""
    if not able_N.any():
        return None
    enough_N = able_N & (size_N >= need)
    if enough_N.any():
        return int(np.argmin(np.where(enough_N, size_N, np.inf)))
    return int(np.argmax(np.where(able_N, size_N, -np.inf)))
