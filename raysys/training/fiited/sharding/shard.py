"""A shard: a store of some buckets, and the protocol that makes exchanges safe to repeat.

State machine. ``done`` is the last exchange whose pushes were applied. A request for ``done + 1``
is staged; when every worker's is there, the gradients are summed per row in worker order, applied
once, the step ends, a round may run, and all pulls are answered. A request for ``done`` is a
repeat and gets the remembered reply; older or later ones are refused, with what to do about it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from raysys.config import check_choice, check_range
from raysys.errors import ConfigError
from raysys.training.fiited.checkpoint import Snapshot, load_shards
from raysys.training.fiited.config import FiitedConfig, TableSpec, budget_slots
from raysys.training.fiited.native import F32, U16, U32, U64
from raysys.training.fiited.sharding.messages import (
    Refusal,
    Reply,
    Request,
    Wire,
    chunk_mask,
    from_wire,
    pack_alive,
    to_wire,
    unpack_alive,
)
from raysys.training.fiited.sharding.rounds import Bin, Cut, Orders, Wishes, salt
from raysys.training.fiited.store import FiitedStore, round_gap


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardConfig:
    """One shard of a group.

    Args:
        index, shards: which one of how many.
        workers: trainers whose gradients make up one step.
        wire: number format of weights and gradients on the way.
        epoch: version of the bucket map.
    """

    index: int = 0
    shards: int = 1
    workers: int = 1
    wire: Wire = "fp32"
    epoch: int = 0

    def __post_init__(self) -> None:
        check_range(self, "shards", 1, 4096)
        check_range(self, "index", 0, self.shards - 1)
        check_range(self, "workers", 1, 4096)
        check_choice(self, "wire", ("fp32", "bf16"))
        check_range(self, "epoch", 0)


@dataclass(frozen=True, slots=True)
class Merged:
    """Gradients of one step, summed over workers: one entry per distinct row."""

    keys: U64
    tables: U16
    counts: U32
    alive: U16
    grads: F32
    norms: F32
    lr: float
    loss_scale: float


class ShardCore:
    """See the module's text. ``owned`` is u8[4096]: 1 for the buckets of this shard.

    Raises:
        ConfigError: a budget or cadence that several shards cannot share.
    """

    def __init__(
        self,
        config: FiitedConfig,
        tables: tuple[TableSpec, ...],
        shard: ShardConfig,
        owned: npt.NDArray[np.uint8],
    ) -> None:
        self.shard, self.owned = shard, owned
        self.config = shard_config(config, shard, tables, float(owned.mean()))
        self.continuous = config.cadence == "continuous"
        self.interval = config.interval
        self.store = FiitedStore(self.config, tables, engine="native")
        self.prefix = config.shape == "prefix"
        self.widest = max(t.dim for t in tables) // config.chunk
        self.chunks = np.array([t.dim // config.chunk for t in tables], np.int64)
        self.done = -1
        self.staged: dict[int, Request] = {}
        self.pulled: dict[int, tuple[U64, U16]] = {}
        self.replies: dict[int, Reply] = {}
        self.next_round = round_gap(0, config.interval)
        self.counters = {"repeats": 0, "stale": 0, "refused": 0, "wire_in": 0, "wire_out": 0}
        self.loads = np.zeros(4096, np.float64)

    def stage(self, request: Request) -> Reply | Refusal | None:
        """Take a request; None means that it waits for the other workers."""
        refusal = self._refusal(request)
        if refusal is not None:
            self.counters["stale" if refusal.reason == "stale" else "refused"] += 1
            return refusal
        if request.step == self.done:
            return self._repeat(request)
        if request.worker in self.staged:
            self.counters["repeats"] += 1
        self.staged[request.worker] = request
        self.counters["wire_in"] += request.nbytes
        return None

    @property
    def ready(self) -> bool:
        """Whether every worker's request for the next exchange is there."""
        return len(self.staged) == self.shard.workers

    def apply(self) -> bool:
        """Apply the staged gradients and end the step; True when a round is due."""
        requests = [self.staged[worker] for worker in sorted(self.staged)]
        merged = self._merge(requests)
        if merged is not None:
            self.store.engine.push(
                merged.keys, merged.tables, merged.counts, merged.alive, merged.grads,
                merged.norms, merged.lr, merged.loss_scale,
            )  # fmt: skip
            self.store.end_step()
        self.done += 1
        if self.continuous or merged is None or self.store.steps < self.next_round:
            return False
        self.next_round = self.store.steps + round_gap(self.store.steps, self.interval)
        return True

    def answer(self) -> dict[int, Reply]:
        """Answer the pulls of all workers from the state after the step."""
        requests, self.staged = self.staged, {}
        self.replies = {worker: self._pull(request) for worker, request in requests.items()}
        self.counters["wire_out"] += sum(r.nbytes for r in self.replies.values())
        return dict(self.replies)

    # The phases of a round (see rounds.py).

    def histogram(self) -> tuple[npt.NDArray[np.int64], int]:
        """Scores by bin, and the chunks that all shards together may keep."""
        return self.store.engine.histogram()  # type: ignore[no-any-return]

    def members(self, found: Bin) -> tuple[F32, U64]:
        """Scores and ties that fall into the bin of the threshold."""
        return self.store.engine.collect(found.index, self._salt())  # type: ignore[no-any-return]

    def wishes(self, cut: Cut) -> Wishes:
        """What this shard would grow and evict."""
        engine = self.store.engine
        grow, evict, alive = engine.plan(cut.score, cut.tie, self._salt())
        return Wishes(engine.planned(0, grow), engine.planned(1, evict), alive)

    def carry_out(self, orders: Orders) -> None:
        """Evict and grow, then start a new round."""
        self.store.engine.apply(orders.grow, orders.evict, orders.elsewhere)
        if self.config.compact:
            self.store.engine.compact(1 << 40)

    def snapshot(self) -> Snapshot:
        """A copy of the state between two exchanges, to be written while training goes on."""
        return Snapshot(self.store, self.position())

    def position(self) -> dict[str, int]:
        """Where the protocol stands; part of a checkpoint."""
        return {"done": self.done, "next_round": self.next_round}

    def restore(self, folders: list[Path]) -> None:
        """Load own buckets from the checkpoints of all shards of another group, of any number.

        Raises:
            DataError: damaged or foreign checkpoints; this shard has not changed.
        """
        extra = load_shards(self.store, folders, self.owned)
        self.done, self.next_round = int(extra["done"]), int(extra["next_round"])

    def alive(self) -> int:
        return int(self.store.engine.counters()["alive"])

    def set_elsewhere(self, chunks: int) -> None:
        """Chunks alive on the other shards; needed after a restore under interval cadence."""
        if not self.continuous:
            self.store.engine.set_elsewhere(chunks)

    def _salt(self) -> int:
        return salt(self.config, int(self.store.engine.counters()["round"]))

    def _refusal(self, request: Request) -> Refusal | None:
        if request.epoch != self.shard.epoch:
            return Refusal("epoch", self.shard.epoch)
        if request.step < self.done:
            return Refusal("stale", self.done)
        if request.step > self.done + 1:
            return Refusal("behind", self.done)
        new = request.step > self.done
        if new and request.push is not None and request.worker not in self.pulled:
            return Refusal("behind", self.done)  # restored: what was pulled must come again first
        foreign = self.owned[(request.keys >> np.uint64(52)).astype(np.int64)] == 0
        return Refusal("rows", int(foreign.sum())) if foreign.any() else None

    def _repeat(self, request: Request) -> Reply:
        """The remembered reply; after a restore the same one, from the same state."""
        self.counters["repeats"] += 1
        if request.worker not in self.replies:
            self.replies[request.worker] = self._pull(request, again=True)
        return self.replies[request.worker]

    def _pull(self, request: Request, *, again: bool = False) -> Reply:
        """The rows asked for; ``again``: the save has counted these lookups already."""
        self.pulled[request.worker] = (request.keys, request.tables)
        np.add.at(self.loads, (request.keys >> np.uint64(52)).astype(np.int64), 1.0)
        alive, values = self.store.engine.pull(request.keys, request.tables, not again)
        wire: Wire = self.shard.wire
        return Reply(request.step, pack_alive(alive, self.prefix), to_wire(values.copy(), wire))

    def _merge(self, requests: list[Request]) -> Merged | None:
        """Sum the pushes per row, workers in order, rows in order of first appearance."""
        pushes = [(r, *self.pulled[r.worker]) for r in requests if r.push is not None]
        if not pushes:
            return None
        keys = np.concatenate([k for _, k, _ in pushes])
        tables = np.concatenate([t for _, _, t in pushes])
        first, inverse = _distinct(keys, tables)
        n, k, width = len(first), self.widest, self.config.chunk
        grads = np.zeros((n, k, width), np.float32)
        norms = np.zeros((n, k), np.float32)
        alive, counts = np.zeros(n, np.uint16), np.zeros(n, np.uint32)
        at = 0
        for request, own, own_tables in pushes:
            push = request.push
            assert push is not None
            rows = inverse[at : at + len(own)]
            at += len(own)
            mine = unpack_alive(push.alive)
            mask = chunk_mask(mine, k)
            valid = np.arange(k) < self.chunks[own_tables.astype(np.int64)][:, None]
            dense = np.zeros((len(own), k, width), np.float32)
            dense[mask] = from_wire(push.grads).reshape(-1, width)
            grads[rows] += dense
            missing = np.zeros((len(own), k), np.float32)
            missing[valid & ~mask] = push.norms.astype(np.float32)
            norms[rows] += missing
            alive[rows] |= mine
            counts[rows] += push.counts
        mask = chunk_mask(alive, k)
        valid = np.arange(k) < self.chunks[tables[first].astype(np.int64)][:, None]
        head = pushes[0][0]
        return Merged(
            keys[first], tables[first], counts, alive, np.ascontiguousarray(grads[mask]),
            np.ascontiguousarray(norms[valid & ~mask]), head.lr, head.loss_scale,
        )  # fmt: skip


def shard_config(
    config: FiitedConfig, shard: ShardConfig, tables: tuple[TableSpec, ...], part: float
) -> FiitedConfig:
    """The configuration of one shard's store.

    With interval cadence every shard knows the whole budget and the rounds divide it; with
    continuous cadence each has a quota by its share of the buckets.

    Raises:
        ConfigError: a budget in bytes, ``scope="table"`` or ``admit_after=0`` over several shards.
    """
    if config.budget_bytes is not None and shard.shards > 1:
        raise ConfigError("budget_bytes", config.budget_bytes, "budget_ratio or budget_slots")
    if config.scope == "table" and shard.shards > 1:
        raise ConfigError("scope", "table", "'global' over several shards")
    slots = budget_slots(config, tables)
    if config.cadence == "continuous":
        slots = max(len(tables), int(slots * part))
        return replace(config, budget_slots=slots, budget_ratio=None, budget_bytes=None)
    if config.admit_after == 0 and shard.shards > 1:
        raise ConfigError("admit_after", 0, "1 or more, or cadence='continuous', over shards")
    return replace(
        config, cadence="manual", budget_slots=slots, budget_ratio=None, budget_bytes=None,
        sketch_cells=config.sketch_cells or min(slots, 2**28),
    )  # fmt: skip


def _distinct(keys: U64, tables: U16) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Positions of first appearances in order, and for every entry its row among them."""
    order = np.lexsort((np.arange(len(keys)), tables, keys))
    k, t = keys[order], tables[order]
    fresh = np.ones(len(keys), bool)
    fresh[1:] = (k[1:] != k[:-1]) | (t[1:] != t[:-1])
    first = order[fresh]
    group = np.cumsum(fresh) - 1
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    inverse = np.empty(len(keys), np.int64)
    inverse[order] = rank[group]
    return np.sort(first), inverse
