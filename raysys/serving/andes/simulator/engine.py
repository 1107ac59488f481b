"""A serving engine in virtual time: iterations, chunked prefill, KV blocks, pauses and restores.

It mirrors vLLM's scheduler: running requests go first, then running prefills, then admissions in
queue order while the whole sequence fits; admission stops at the first misfit; a running request
that gets no block makes the newest one give way, by recomputation. Between events, equal decode
steps are advanced together, which changes no result.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from raysys.errors import InfeasibleError
from raysys.serving.andes.simulator.blocks import BlockPool, PrefixIndex
from raysys.serving.andes.simulator.machine import EngineConfig, SimStats
from raysys.serving.andes.simulator.workload import Workload
from raysys.serving.andes.snapshot import FloatArray, IntArray
from raysys.serving.andes.table import RequestTable

__all__ = ["MAX_JUMP", "EngineConfig", "Policy", "SimEngine", "SimStats"]

MAX_JUMP = 64


class Policy(Protocol):
    """Orders and pauses; the engine does the rest.

    ``before_step`` may call :meth:`SimEngine.pause`, reorder ``engine.waiting`` and set
    ``engine.batch_cap``. ``horizon`` bounds how many equal steps may be advanced together.
    """

    name: str

    def on_event(self) -> None:
        """A request arrived or was evicted."""

    def on_finish(self, context_tokens: float) -> None:
        """A request finished and gave its room back."""

    def before_step(self, engine: SimEngine) -> None:
        """Decide before a step."""

    def after_step(
        self, steps: int, batch: int, prefill: int, context: int, seconds: float, restored: float
    ) -> None:
        """Account ``steps`` equal steps that took ``seconds`` in all."""

    def horizon(self, engine: SimEngine) -> int:
        """Most steps until ``before_step`` must be asked again."""


class SimEngine:
    """Runs one workload under one policy to completion.

    Raises:
        InfeasibleError: a request can never fit the KV room.
    """

    def __init__(self, workload: Workload, config: EngineConfig, policy: Policy) -> None:
        self.workload = workload
        self.config = config
        self.policy = policy
        self.pool = BlockPool(
            config.kv_tokens // config.block_tokens, config.block_tokens, config.prefix_cache
        )
        self._check_fit()
        room = max(1, workload.size)
        self.table = RequestTable(room)
        self.now_s = 0.0
        self.waiting: list[int] = []
        self.decoding: list[int] = []
        self.prefilling: list[int] = []
        self.batch_cap = config.max_batch
        self.stats = SimStats()
        self.request = np.zeros(room, dtype=np.int64)  # slot -> request of the workload
        self.left = np.zeros(room, dtype=np.int64)
        self.blocks = np.zeros(room, dtype=np.int64)
        self.admitted = np.zeros(room, dtype=np.int64)
        self.repeat = np.zeros(room, dtype=np.bool_)
        self.first_s: FloatArray = np.full(room, np.nan)
        self.finish_s: FloatArray = np.zeros(room)
        self.final = np.zeros((3, room))  # tokens, lag, delay sum
        self.preempted = np.zeros(room, dtype=np.int64)
        self._prefixes = PrefixIndex(config.prefix_room) if config.prefix_room else None
        self._next = 0
        self._sequence = 0

    def _check_fit(self) -> None:
        longest = self.workload.prompt_tokens + self.workload.output_tokens
        room = self.pool.blocks * self.config.block_tokens
        if self.workload.size and int(longest.max()) > room:
            raise InfeasibleError(
                f"a request of {int(longest.max())} tokens",
                f"the KV room is {room} tokens",
                "Raise kv_tokens or drop such requests from the workload",
            )

    @property
    def running(self) -> int:
        return len(self.decoding) + len(self.prefilling)

    @property
    def free_tokens(self) -> int:
        return self.pool.free * self.config.block_tokens

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def next_arrival_s(self) -> float | None:
        """When the next request comes; None after the last one."""
        arrivals = self.workload.arrival_s
        return float(arrivals[self._next]) if self._next < arrivals.size else None

    def run(self) -> None:
        """Serve every request to its last token."""
        while self.busy or self.next_arrival_s() is not None:
            self.turn()

    def turn(self) -> None:
        """One iteration; an idle engine goes to its next arrival first."""
        following = self.next_arrival_s()
        if not self.busy and following is not None:
            self.now_s = max(self.now_s, following)
        self._arrive()
        self.policy.before_step(self)
        self._step()

    def pause(self, slot: int) -> None:
        """Stop a running request; its blocks are freed, its full ones stay cached."""
        (self.decoding if self.table.missing_tokens[slot] == 0 else self.prefilling).remove(slot)
        held = int(self.blocks[slot])
        computed = self.table.context_tokens[slot] - self.table.missing_tokens[slot]
        self.pool.give(held, slot, min(held, int(computed) // self.config.block_tokens))
        self.blocks[slot] = 0
        self.table.running[slot] = self.table.pausable[slot] = False
        self.table.served_s[slot] = self.now_s
        self.table.preemptions[slot] += 1
        self.table.missing_tokens[slot] = self.table.context_tokens[slot]
        self.repeat[slot] = True
        self.waiting.insert(0, slot)
        self.stats.pauses += 1

    def missing(self, slot: int) -> float:
        """Tokens to compute if a waiting request were admitted now, cheap restores counted."""
        context = float(self.table.context_tokens[slot])
        if not self.repeat[slot]:
            return context
        rest = max(1.0, context - self.pool.cached_tokens(slot))
        return max(1.0, float(np.ceil(rest * self.config.restore_fraction)))

    def _arrive(self) -> None:
        w = self.workload
        while self._next < w.size and w.arrival_s[self._next] <= self.now_s:
            self.accept(self._next)
            self._next += 1
        self.stats.peak_waiting = max(self.stats.peak_waiting, len(self.waiting))

    def accept(self, r: int) -> None:
        """Request ``r`` of the workload comes in."""
        w = self.workload
        slot = self.table.add(w.spec(r), float(w.arrival_s[r]), int(w.prompt_tokens[r]))
        self.request[slot] = r
        self.left[slot] = w.output_tokens[r]
        self.blocks[slot] = 0
        self.repeat[slot] = False
        self.waiting.append(slot)
        self.policy.on_event()

    def _step(self) -> None:
        evicted = self._make_room_for_growth()
        stall = not self.config.chunked
        if not evicted and self.waiting:
            self._admit()
        decoding = self.decoding
        if stall and self.prefilling:
            decoding = []
        jump = 1 if self.prefilling or evicted else self._jump()
        slots = np.array(decoding, dtype=np.int64)
        prefill, restored, done = self._prefill(self.config.step_tokens - len(decoding))
        if not decoding and not self.prefilling:
            self._idle()
            return
        self._advance(slots, jump, prefill, restored, done)

    def _idle(self) -> None:
        """Nothing runs although something may wait: go to the next arrival, or fail loudly."""
        following = self.next_arrival_s()
        if following is not None:
            self.now_s = max(self.now_s, following)
        elif self.waiting:
            self.batch_cap = self.config.max_batch
            self.policy.on_event()
            if self.pool.free == self.pool.blocks and self._stuck():
                raise InfeasibleError("serving the rest", "the policy admits nobody")

    def _stuck(self) -> bool:
        self.policy.before_step(self)
        self._admit()
        return not self.prefilling

    def _make_room_for_growth(self) -> bool:
        """Blocks for every decoder's next token; the newest request gives way if there are none."""
        evicted = False
        size = self.config.block_tokens
        while self.decoding:
            slots = np.array(self.decoding, dtype=np.int64)
            target = (self.table.context_tokens[slots].astype(np.int64) + size - 1) // size
            need = int((target - self.blocks[slots]).clip(min=0).sum())
            if need <= self.pool.free:
                if need:
                    self.pool.take(need)
                    self.blocks[slots] = np.maximum(self.blocks[slots], target)
                break
            running = self.decoding + self.prefilling
            self.pause(max(running, key=lambda slot: self.admitted[slot]))
            self.stats.pauses -= 1
            self.stats.evictions += 1
            evicted = True
            self.policy.on_event()
        return evicted

    def _admit(self) -> None:
        """Take from the queue's head while batch, budget and whole-sequence room allow it."""
        budget = self.config.step_tokens - len(self.decoding)
        budget -= int(sum(self.table.missing_tokens[slot] for slot in self.prefilling))
        taken = 0
        for slot in self.waiting:
            if self.running >= self.batch_cap or budget <= 0:
                break
            blocks = self.pool.needed(int(self.table.context_tokens[slot]))
            if blocks > self.pool.free:
                break
            missing = self._start(slot, blocks)
            budget -= int(missing)
            taken += 1
        del self.waiting[:taken]

    def _start(self, slot: int, blocks: int) -> float:
        missing = self.missing(slot)
        if self._prefixes is not None and not self.repeat[slot] and self.workload.prefix_ids:
            ids = self.workload.prefix_ids[int(self.request[slot])]
            known = self._prefixes.hits(ids) * self.workload.prefix_block_tokens
            missing = max(1.0, missing - known)
        self.pool.claim(slot)
        self.pool.take(blocks)
        self.blocks[slot] = blocks
        self.table.missing_tokens[slot] = missing
        self.table.running[slot] = True
        self.table.pausable[slot] = False
        self.admitted[slot] = self._sequence
        self._sequence += 1
        self.prefilling.append(slot)
        return missing

    def _prefill(self, budget: int) -> tuple[int, float, list[int]]:
        """Compute prompt chunks; returns tokens, repeated tokens, and who gets a token."""
        total, restored = 0, 0.0
        done: list[int] = []
        missing = self.table.missing_tokens
        for slot in self.prefilling:
            chunk = min(int(missing[slot]), budget)
            if not self.config.chunked and not total:
                chunk = int(missing[slot])  # a whole prompt, even beyond the budget
            if chunk <= 0 or (not self.config.chunked and chunk < missing[slot]):
                break
            missing[slot] -= chunk
            budget -= chunk
            total += chunk
            restored += chunk if self.repeat[slot] else 0
            if missing[slot] == 0:
                done.append(slot)
        return total, restored, done

    def _jump(self) -> int:
        """How many equal decode steps can be taken before anything can change."""
        slots = np.array(self.decoding, dtype=np.int64)
        if not slots.size:
            return 1
        most = min(MAX_JUMP, self.policy.horizon(self), int(self.left[slots].min()))
        following = self.next_arrival_s()
        if following is not None and most > 1:
            context = float(self.table.context_tokens[slots].sum())
            gap = following - self.now_s
            step = float(self.config.step_time.predict(slots.size, 0, context))
            most = min(most, max(1, int(gap / step) + 1))
        size = self.config.block_tokens
        while most > 1:
            grown = self.table.context_tokens[slots].astype(np.int64) + (most - 1)
            target = (grown + size - 1) // size
            need = int((target - self.blocks[slots]).clip(min=0).sum())
            if need <= self.pool.free:
                self.pool.take(need)
                self.blocks[slots] = np.maximum(self.blocks[slots], target)
                return most
            most //= 2
        return 1

    def _advance(
        self, slots: IntArray, jump: int, prefill: int, restored: float, done: list[int]
    ) -> None:
        """Let time pass and deliver the tokens."""
        table = self.table
        batch = slots.size + len(self.prefilling)
        context = float(table.context_tokens[slots].sum())
        grown = context + slots.size * np.arange(jump)
        steps_s = self.config.step_time.predict(batch, prefill, grown)
        times = self.now_s + np.cumsum(steps_s)
        seconds = float(times[-1] - self.now_s)
        if slots.size:
            self._deliver(slots, times)
        self.now_s = float(times[-1])
        if done:
            finished = np.array(done, dtype=np.int64)
            self._deliver(finished, times[-1:])
            self.decoding.extend(done)
            gone = set(done)
            self.prefilling = [slot for slot in self.prefilling if slot not in gone]
            table.pausable[finished] = True
            slots = np.concatenate([slots, finished])
        stats = self.stats
        stats.steps += jump
        stats.busy_s += seconds
        stats.prefill_tokens += prefill
        stats.restored_tokens += restored
        self._finish(slots[self.left[slots] <= 0])
        self.policy.after_step(jump, batch, prefill, int(context), seconds, restored)

    def _deliver(self, slots: IntArray, times: FloatArray) -> None:
        """One token per slot at each of ``times``: shape (S,), (J,)."""
        table = self.table
        fresh = slots[table.tokens[slots] == 0]
        self.first_s[self.request[fresh]] = times[0]
        n, tau = table.tokens[slots], table.tau_s[slots]
        jump = times.size
        late = times[:, None] - (table.submitted_s[slots] + table.ttft_s[slots] + n * tau)
        late -= np.arange(jump)[:, None] * tau
        late[0] = np.maximum(late[0], table.lag_s[slots])
        lag = np.maximum.accumulate(late, axis=0)
        table.lag_s[slots] = lag[-1]
        table.delay_sum_s[slots] += lag.sum(axis=0)
        table.tokens[slots] = n + jump
        table.context_tokens[slots] += jump
        self.left[slots] -= jump

    def _finish(self, slots: IntArray) -> None:
        for slot in map(int, slots):
            r = int(self.request[slot])
            self.decoding.remove(slot)
            self.pool.give(int(self.blocks[slot]))
            self.finish_s[r] = self.now_s
            table = self.table
            self.final[:, r] = table.tokens[slot], table.lag_s[slot], table.delay_sum_s[slot]
            self.preempted[r] = table.preemptions[slot]
            self.policy.on_finish(float(table.context_tokens[slot]))
            table.remove(slot)
