"""Data-parallel freezing: all ranks switch at the same optimizer step.

Rank 0 holds the real controller. Every ``every`` steps it broadcasts (version, frozen_upto), which
all ranks then apply before their next step; between broadcasts no rank looks at a decision. The
communicated bytes are counted, since a frozen prefix has no gradients to reduce.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raysys.errors import ConfigError
from raysys.training.kgt.decision import Control, Decision, Offer

Broadcast = Callable[[Tensor], None]


def broadcast_from_zero(value: Tensor) -> None:
    """Overwrite ``value`` on every rank by rank 0's."""
    dist.broadcast(value, src=0)


class DistributedControl:
    """The controller as one rank sees it.

    Args:
        inner: the real controller on rank 0, None elsewhere.
        every: optimizer steps between broadcasts.
        broadcast: collective that overwrites a tensor by rank 0's.
    """

    def __init__(
        self,
        inner: Control | None,
        rank: int,
        *,
        every: int = 10,
        broadcast: Broadcast = broadcast_from_zero,
    ) -> None:
        if (inner is None) != (rank != 0):
            raise ConfigError("inner", inner, "a controller on rank 0 and None on the others")
        if every < 1:
            raise ConfigError("every", every, "at least 1")
        self.inner = inner
        self.every = every
        self.aborted = 0
        self._broadcast = broadcast
        self._decision = Decision()

    @property
    def needs_gradients(self) -> bool:
        """Whether the inner criterion looks at gradients."""
        return bool(getattr(self.inner, "needs_gradients", False))

    def wants(self, step: int) -> tuple[int, ...]:
        """Rank 0 captures what its controller wants."""
        return self.inner.wants(step) if self.inner is not None else ()

    def observe(self, step: int, loss: float, rate: float, epoch: int) -> None:
        """Pass the step on, and exchange decisions where it is time."""
        if self.inner is not None:
            self.inner.observe(step, loss, rate, epoch)
        if (step + 1) % self.every:
            return
        newest = self.inner.latest() if self.inner is not None else Decision()
        message = torch.tensor([newest.version, newest.frozen_upto, step], dtype=torch.int64)
        self._broadcast(message)
        version, upto, at = (int(value) for value in message)
        if at != step:
            # Ranks out of step: a switch now would differ between them. Train on as it is.
            self.aborted += 1
        elif version > self._decision.version:
            self._decision = Decision(version, upto, step + 1, newest.reason or "from rank 0")

    def offer(self, offer: Offer) -> bool:
        """Pass a captured batch on."""
        return self.inner.offer(offer) if self.inner is not None else False

    def gradients(self, step: int, modules: list[list[nn.Parameter]]) -> None:
        """Pass gradients on."""
        if self.inner is not None:
            self.inner.gradients(step, modules)

    def latest(self) -> Decision:
        """The newest decision that all ranks know."""
        return self._decision

    def state_dict(self) -> dict[str, Any]:
        """The agreed decision and, on rank 0, the controller."""
        d = self._decision
        inner = self.inner.state_dict() if self.inner is not None else None
        return {"decision": (d.version, d.frozen_upto, d.effective_step, d.reason), "inner": inner}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a checkpoint's state."""
        self._decision = Decision(*state["decision"])
        if self.inner is not None and state["inner"] is not None:
            self.inner.load_state_dict(state["inner"])

    def close(self) -> None:
        """Close the controller."""
        if self.inner is not None:
            self.inner.close()


class ByteCount:
    """Gradient bytes handed to all-reduce; shared by successive DDP wrappers."""

    def __init__(self) -> None:
        self.total = 0


def data_parallel(count: ByteCount) -> Callable[[nn.Module], nn.Module]:
    """Make the ``wrap`` argument of :class:`KGT`: DDP, built anew after each change of the prefix.

    Buckets are fixed when DDP is built, so a changed prefix needs a new wrapper; the optimizer and
    the model stay. ``find_unused_parameters`` would walk the graph in every step instead.
    """

    def wrap(module: nn.Module) -> nn.Module:
        parallel = DistributedDataParallel(module)
        parallel.register_comm_hook(count, _counted_all_reduce)
        return parallel

    return wrap


def _counted_all_reduce(count: ByteCount, bucket: Any) -> torch.futures.Future[Tensor]:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    buffer = bucket.buffer()
    count.total += buffer.numel() * buffer.element_size()
    world: Any = dist.group.WORLD
    future: torch.futures.Future[Tensor] = allreduce_hook(world, bucket)
    return future


# DDP compares the hook's annotations with its own classes, and strings are none of them.
_counted_all_reduce.__annotations__.clear()
