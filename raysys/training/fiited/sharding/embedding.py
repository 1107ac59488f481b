"""``ShardedEmbedding``: the trainer's side of sharded tables, as a PyTorch layer.

A training step is ``begin`` (one exchange per shard: the last step's gradients go, this step's rows
come), the forward and backward pass, and ``keep_gradients``. The requests since the last checkpoint
are remembered, so that a restarted shard can be brought back to the others' step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from raysys.errors import ConfigError, RemoteError
from raysys.training.fiited.config import FiitedConfig, TableSpec
from raysys.training.fiited.native import F32, U16
from raysys.training.fiited.sharding.messages import (
    Push,
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
from raysys.training.fiited.sharding.rounds import Cut, Orders, churn_of, find_bin, find_cut, share
from raysys.training.fiited.sharding.routing import BucketMap, Routed, Router
from raysys.training.fiited.sharding.shard import ShardCore

Recover = Callable[[int, Refusal], Reply]


class Transport(Protocol):
    """Carries requests to shards; ``requests`` has one entry per shard.

    ``recover(shard, refusal)`` turns a refusal into the reply. It must not wait for other shards'
    answers: these may wait, in a round, for the very shard that is to be recovered.
    """

    def exchange(self, requests: Sequence[Request], recover: Recover) -> list[Reply]: ...

    def exchange_one(self, shard: int, request: Request) -> Reply | Refusal: ...


class LocalTransport:
    """Shards in this process: direct calls, no actor; one worker."""

    def __init__(self, cores: Sequence[ShardCore]) -> None:
        self.cores = list(cores)

    def exchange(self, requests: Sequence[Request], recover: Recover) -> list[Reply]:
        answers = [core.stage(request) for core, request in zip(self.cores, requests)]
        waiting = [core for core, answer in zip(self.cores, answers) if answer is None]
        due = [core for core in waiting if core.apply()]
        if due:
            run_round(due)
        fresh = {id(core): core.answer() for core in waiting}
        found: list[Reply | Refusal] = [
            fresh[id(core)][request.worker] if answer is None else answer
            for core, request, answer in zip(self.cores, requests, answers)
        ]
        return [recover(i, one) if isinstance(one, Refusal) else one for i, one in enumerate(found)]

    def exchange_one(self, shard: int, request: Request) -> Reply | Refusal:
        raise RemoteError(f"embedding shard {shard}", "it lost its state", "Restart the run")


def run_round(cores: Sequence[ShardCore]) -> list[Orders]:
    """One round over shards in this process."""
    found = [core.histogram() for core in cores]
    target = found[0][1]
    where = find_bin([bins for bins, _ in found], target)
    cut = find_cut([c.members(where) for c in cores], where.keep) if where.index >= 0 else Cut()
    wishes = [core.wishes(cut) for core in cores]
    orders = share(wishes, target, churn_of(cores[0].config))
    for core, order in zip(cores, orders):
        core.carry_out(order)
    return orders


@dataclass(slots=True)
class _Step:
    """What the backward pass needs of the rows of one step."""

    routed: Routed
    places: list[npt.NDArray[np.int64]]
    alive: U16
    rows: Tensor


class ShardedEmbedding(nn.Module):
    """Pooled embeddings of tables that live on shards.

    Args:
        config, tables: as given to the shards.
        buckets: the map of rows to shards.
        transport: how to reach them.
        worker: index of this trainer among those that train together.
        share: this worker's share of the global batch: gradients of a mean loss over its own
            samples are multiplied by it, so that the sum over workers is the global mean's.
        loss_scale: samples of the global batch for a mean loss, 1 for a sum (for utilities).
        wire: number format of gradients on the way.
    """

    def __init__(
        self,
        config: FiitedConfig,
        tables: tuple[TableSpec, ...],
        buckets: BucketMap,
        transport: Transport,
        *,
        worker: int = 0,
        share: float = 1.0,
        loss_scale: float = 1.0,
        wire: Wire = "fp32",
    ) -> None:
        super().__init__()
        if len({t.dim for t in tables}) > 1:
            raise ConfigError("tables", [t.dim for t in tables], "one width for sharded tables")
        self.router = Router(config, tables, buckets)
        self.transport, self.worker, self.share, self.wire = transport, worker, share, wire
        self.config, self.tables = config, tables
        self.k = tables[0].dim // config.chunk
        self.lr, self.loss_scale = config.lr, loss_scale
        self.exchanges = 0
        self.pending: list[Push] | None = None
        self.log: list[list[Request]] = []
        self.wire_bytes = {"out": 0, "in": 0}
        self._step: _Step | None = None

    def forward(self, ids: Tensor) -> Tensor:
        """Vectors [B, T * D] of ids [B, T], one id per table."""
        if ids.ndim != 2 or ids.shape[1] != len(self.tables):
            raise ConfigError("ids", tuple(ids.shape), f"[batch, {len(self.tables)}]")
        step = self.begin(list(ids.numpy().T))
        function: Any = _Rows.apply
        out: Tensor = function(step.rows, torch.from_numpy(step.routed.inverse))
        batch, width = len(ids), self.tables[0].dim
        return out.reshape(len(self.tables), batch, width).transpose(0, 1).reshape(batch, -1)

    def begin(self, values: list[npt.ArrayLike]) -> _Step:
        """One exchange per shard for a batch's rows; takes the kept gradients along."""
        if self._step is not None and self.training:
            self.keep_gradients()
        routed = self.router.route(values)
        shards = self.router.buckets.shards
        places = [np.flatnonzero(routed.shards == shard) for shard in range(shards)]
        requests = [self._request(routed, place, i) for i, place in enumerate(places)]
        return self.rows_of(routed, places, self._exchange(requests))

    def rows_of(
        self, routed: Routed, places: list[npt.NDArray[np.int64]], replies: list[Reply]
    ) -> _Step:
        """Rows as a leaf tensor from the shards' ragged replies."""
        alive = np.zeros(len(routed.keys), np.uint16)
        dense = np.zeros((len(routed.keys), self.k, self.config.chunk), np.float32)
        for place, reply in zip(places, replies):
            mine = unpack_alive(reply.alive)
            alive[place] = mine
            block = np.zeros((len(place), self.k, self.config.chunk), np.float32)
            block[chunk_mask(mine, self.k)] = from_wire(reply.values).reshape(-1, block.shape[2])
            dense[place] = block
        rows = torch.from_numpy(
            dense.reshape(len(dense), self.k * self.config.chunk)
        ).requires_grad_(self.training)
        self._step = _Step(routed, places, alive, rows)
        return self._step

    def keep_gradients(self) -> None:
        """Turn the rows' gradients into pushes for the next exchange."""
        step, self._step = self._step, None
        if step is None:
            return
        grad = step.rows.grad
        dense = np.zeros(step.rows.shape, np.float32) if grad is None else grad.numpy() * self.share
        blocks = dense.astype(np.float32, copy=False).reshape(-1, self.k, self.config.chunk)
        self.pending = [self._push(step, blocks, place) for place in step.places]

    def finish(self) -> None:
        """Send the last gradients; without it the last step would be lost."""
        self.begin([np.empty(0, np.int64)] * len(self.tables))
        self._step = None
        self.pending = None

    def checkpointed(self, exchange: int) -> None:
        """The shards have saved after this exchange: earlier ones need not be remembered."""
        self.log = [requests for requests in self.log if requests[0].step >= exchange]

    def _request(self, routed: Routed, place: npt.NDArray[np.int64], shard: int) -> Request:
        push = self.pending[shard] if self.pending is not None else None
        return Request(
            routed.epoch, self.worker, self.exchanges, routed.keys[place], routed.tables[place],
            push, self.lr, self.loss_scale,
        )  # fmt: skip

    def _push(self, step: _Step, blocks: F32, place: npt.NDArray[np.int64]) -> Push:
        alive, grads = step.alive[place], blocks[place]
        mask = chunk_mask(alive, self.k)
        norms = np.sqrt(np.sum(grads * grads, axis=2))[~mask]
        return Push(
            pack_alive(alive, self.config.shape == "prefix"),
            step.routed.counts[place],
            to_wire(np.ascontiguousarray(grads[mask].reshape(-1)), self.wire),
            np.minimum(norms, 65504.0).astype(np.float16),
        )

    def _exchange(self, requests: list[Request]) -> list[Reply]:
        self.log.append(requests)
        replies = self.transport.exchange(requests, self._recover)
        self.wire_bytes["out"] += sum(r.nbytes for r in requests)
        self.wire_bytes["in"] += sum(r.nbytes for r in replies)
        self.exchanges += 1
        self.pending = None
        return replies

    def _recover(self, shard: int, refusal: Refusal) -> Reply:
        """Bring a shard that came back from a checkpoint to this exchange.

        Raises:
            RemoteError: it needs exchanges from before the last checkpoint, or refuses otherwise.
        """
        if refusal.reason != "behind":
            reason = f"{refusal.reason} ({refusal.value})"
            raise RemoteError(f"embedding shard {shard}", reason, "Restart from a checkpoint")
        first = self.log[0][shard].step
        if max(refusal.value, 0) < first:
            reason = f"it is at exchange {refusal.value}, the log starts at {first}"
            raise RemoteError(f"embedding shard {shard}", reason, "Restart from a checkpoint")
        answer: Reply | Refusal = refusal
        for requests in self.log:
            if requests[shard].step >= refusal.value:
                answer = self.transport.exchange_one(shard, requests[shard])
        if isinstance(answer, Refusal):
            raise RemoteError(
                f"embedding shard {shard}", answer.reason, "Restart from a checkpoint"
            )
        return answer


class _Rows(torch.autograd.Function):
    """rows[inverse] whose backward sums in order of appearance (deterministic)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.count = len(rows)
        return rows[inverse]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (inverse,) = ctx.saved_tensors
        out = torch.zeros(ctx.count, grads[0].shape[1])
        return out.index_add_(0, inverse, grads[0].to(torch.float32)), None
