"""The kernel ladder: three ways to train a chunk of clients that give the same numbers.

"batched": hand-derived batched kernels, for MLPs, linear models and bags of embeddings.
"vmap":    ``torch.func`` maps the gradient over clients; best for small convolutional nets.
"loop":    one re-used module trains client after client; best where arithmetic dominates.
"program": a client's own code, see :mod:`program`; for that code, the only one.

Dimensions: C clients, K models of a round, P parameters, S steps, B places of a batch, N samples.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from raysys.errors import ConfigError
from raysys.federated.core.batching import Batches
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.model import EmbeddingBag, Layout, Mlp, ModelSpec, layout_of
from raysys.federated.core.program import FromProgram
from raysys.ops.kernels import load_kernel

RUNGS = ("batched", "vmap", "loop", "program")
LOOP_FROM_PARAMS = 100_000
KERNELS: dict[type, str] = {Mlp: "batched_mlp", EmbeddingBag: "batched_embedding_bag"}


@dataclasses.dataclass(frozen=True, slots=True)
class Trained:
    """What a chunk gives back: deltas w - w0 float32 [C, P], losses of first and last batch [C].

    ``half`` is the delta after the first half of each client's steps, where it was asked for.
    """

    delta: Tensor
    loss_first: Tensor
    loss_last: Tensor
    half: Tensor | None = None


class _Halfway:
    """Copies each client's parameters after the first half of its steps, rounded down.

    Clients stand by falling number of steps, so those that are halfway at one step are a run.
    """

    def __init__(self, active: list[int], clients: int, n_params: int) -> None:
        self.flat = torch.empty(clients, n_params)
        steps = [sum(k > client for k in active) for client in range(clients)]
        self._half = [count // 2 for count in steps]
        self._runs: dict[int, tuple[int, int]] = {}
        for client, half in enumerate(self._half):
            begin, _ = self._runs.get(half, (client, client))
            self._runs[half] = (begin, client + 1)

    def chunk(self, step: int, params: Sequence[Tensor]) -> None:
        """Copy the clients that are halfway before ``step`` out of stacked parameters."""
        if step in self._runs:
            begin, end = self._runs[step]
            parts = [part[begin:end].reshape(end - begin, -1) for part in params]
            torch.cat(parts, dim=1, out=self.flat[begin:end])

    def client(self, step: int, client: int, params: Sequence[Tensor]) -> None:
        """The same for one client that trains alone."""
        if self._half[client] == step:
            torch.cat([part.reshape(-1) for part in params], out=self.flat[client])


def available_rungs(spec: ModelSpec) -> tuple[str, ...]:
    """Rungs that can train a spec, most specialised first."""
    if isinstance(spec.architecture, FromProgram):
        return ("program",)
    has_kernel = type(spec.architecture) in KERNELS
    return RUNGS[:3] if has_kernel else RUNGS[1:3]


def static_rung(spec: ModelSpec) -> str:
    """The choice that needs no measurement: kernel if there is one, else by the model's size."""
    if isinstance(spec.architecture, FromProgram):
        return "program"
    if type(spec.architecture) in KERNELS:
        return "batched"
    return "vmap" if layout_of(spec).n_params < LOOP_FROM_PARAMS else "loop"


def train_chunk(
    rung: str,
    spec: ModelSpec,
    weights_KP: Tensor,
    rows_C: Tensor,
    inputs: Tensor,
    targets: Tensor,
    batches: Batches,
    config: LocalConfig,
    drift_CP: Tensor | None = None,
    halves: bool = False,
) -> Trained:
    """Train a chunk of clients, each from a row of ``weights_KP`` (left as it is).

    Args:
        rung: one of :func:`available_rungs`.
        weights_KP: float32 weights of the round's models. rows_C: int64 row of each client.
        inputs, targets: the sample arrays that ``batches`` index.
        drift_CP: added to every gradient (SCAFFOLD), or None.
        halves: also return the delta of the first half of each client's steps.

    Raises:
        ConfigError: unknown rung, or one that cannot train this model.
    """
    if rung not in available_rungs(spec) or rung == "program":
        raise ConfigError("rung", rung, f"one of {available_rungs(spec)} for this model")
    layout = layout_of(spec)
    drift = None if drift_CP is None else layout.split(drift_CP)
    halfway = _Halfway(batches.active, len(rows_C), layout.n_params) if halves else None
    if rung == "loop":
        delta = torch.empty(len(rows_C), layout.n_params)
        starts = [weights_KP[row] for row in rows_C.tolist()]
        first, last = _train_loop(
            spec, starts, delta, inputs, targets, batches, config, drift, halfway
        )
    else:
        params = [part.index_select(0, rows_C) for part in layout.split(weights_KP)]
        train = _train_batched if rung == "batched" else _train_vmap
        first, last = train(spec, params, inputs, targets, batches, config, drift, halfway)
        delta = torch.cat([part.reshape(len(rows_C), -1) for part in params], dim=1)
    # Clients of one model mostly stand together: subtract run by run, without a gathered copy.
    row, length = torch.unique_consecutive(rows_C, return_counts=True)
    half = None if halfway is None else halfway.flat
    for moved in (delta, half) if half is not None else (delta,):
        for place, part in zip(row.tolist(), torch.split(moved, length.tolist())):
            part.sub_(weights_KP[place])
    return Trained(delta, first, last, half)


def sample_losses(out: Tensor, targets: Tensor, task: str) -> Tensor:
    """Loss of each sample: cross-entropy, or squared error averaged over the outputs."""
    if task == "regression":
        return (out - targets).square().mean(dim=-1)
    return functional.cross_entropy(out, targets, reduction="none")


@functools.lru_cache(maxsize=8)
def cached_module(spec: ModelSpec) -> nn.Module:
    """The one module of a spec that this process re-uses; its parameters are scratch space."""
    with torch.random.fork_rng(devices=[]):
        module: nn.Module = spec.architecture.build()
    return module


def _train_batched(
    spec: ModelSpec,
    params: list[Tensor],
    inputs: Tensor,
    targets: Tensor,
    batches: Batches,
    config: LocalConfig,
    drift: Sequence[Tensor] | None,
    halfway: _Halfway | None = None,
) -> tuple[Tensor, Tensor]:
    kernel = load_kernel(KERNELS[type(spec.architecture)])
    first, last = kernel.train(
        params,
        inputs if isinstance(spec.architecture, EmbeddingBag) else inputs.flatten(1),
        targets,
        batches.index,
        batches.scale,
        batches.active,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        prox_mu=config.prox_mu,
        drift=drift,
        regression=spec.task == "regression",
        before_step=None if halfway is None else lambda step: halfway.chunk(step, params),
    )
    return first, last


@functools.lru_cache(maxsize=8)
def _mapped_gradient(spec: ModelSpec) -> Callable[..., tuple[tuple[Tensor, ...], Tensor]]:
    """Gradient and loss of one client, mapped over clients."""
    module = cached_module(spec)
    names = layout_of(spec).names

    def loss(params: tuple[Tensor, ...], x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        out = torch.func.functional_call(module, dict(zip(names, params)), (x,))
        return (sample_losses(out, y, spec.task) * scale).sum()

    mapped: Any = torch.func.vmap(torch.func.grad_and_value(loss), randomness="different")
    return mapped  # type: ignore[no-any-return]


def _train_vmap(
    spec: ModelSpec,
    params: list[Tensor],
    inputs: Tensor,
    targets: Tensor,
    batches: Batches,
    config: LocalConfig,
    drift: Sequence[Tensor] | None,
    halfway: _Halfway | None = None,
) -> tuple[Tensor, Tensor]:
    gradient = _mapped_gradient(spec)
    sgd = _Sgd(params, config, drift)
    first = params[0].new_zeros(len(params[0]))
    last = torch.zeros_like(first)
    for step, k in enumerate(batches.active):
        if halfway is not None:
            halfway.chunk(step, params)
        index = batches.index[step, :k]
        live = tuple(part[:k] for part in params)
        grads, losses = gradient(live, inputs[index], targets[index], batches.scale[step, :k])
        if step == 0:
            first.copy_(losses)
        last[:k] = losses
        sgd.step(live, grads, slice(0, k))
    return first, last


def _train_loop(
    spec: ModelSpec,
    starts: Sequence[Tensor],
    trained: Tensor,
    inputs: Tensor,
    targets: Tensor,
    batches: Batches,
    config: LocalConfig,
    drift: Sequence[Tensor] | None,
    halfway: _Halfway | None = None,
) -> tuple[Tensor, Tensor]:
    """Train one client after another from ``starts``; their weights go into ``trained`` [C, P].

    Each client's weights are read once and written once: copies of all of them cost a tenth of the
    training of a model of a million parameters.
    """
    layout = layout_of(spec)
    module = cached_module(spec).train()
    own = list(module.parameters())
    first = torch.zeros(len(starts))
    last = torch.zeros_like(first)
    for client in range(len(first)):
        here = slice(client, client + 1)
        live = [p.data for p in own]
        for target, source in zip(live, layout.split(starts[client][None])):
            target.copy_(source[0])
        own_drift = None if drift is None else [part[client] for part in drift]
        sgd = _Sgd(live, config, own_drift)
        for step, k in enumerate(batches.active):
            if client >= k:
                break
            if halfway is not None:
                halfway.client(step, client, live)
            scale = batches.scale[step, client]
            filled = int(torch.count_nonzero(scale))
            index = batches.index[step, client, :filled]
            out = module(inputs[index])
            loss = (sample_losses(out, targets[index], spec.task) * scale[:filled]).sum()
            grads = torch.autograd.grad(loss, own)
            if step == 0:
                first[here] = loss.detach()
            last[here] = loss.detach()
            sgd.step(live, grads, slice(None))
        torch.cat([part.reshape(-1) for part in live], out=trained[client])
    return first, last


class _Sgd:
    """SGD with momentum, weight decay, proximal term and drift, on lists of (stacked) tensors."""

    def __init__(
        self, params: Sequence[Tensor], config: LocalConfig, drift: Sequence[Tensor] | None
    ) -> None:
        self._config = config
        self._drift = drift
        self._start = [p.clone() for p in params] if config.prox_mu else None
        self._velocity = [torch.zeros_like(p) for p in params] if config.momentum else None

    def step(self, live: Sequence[Tensor], grads: Sequence[Tensor], rows: slice) -> None:
        """Update ``live`` in place by one step; ``rows`` are its clients."""
        config = self._config
        with torch.no_grad():
            for place, (weight, found) in enumerate(zip(live, grads)):
                grad = found
                if config.weight_decay:
                    grad = grad.add(weight, alpha=config.weight_decay)
                if self._start is not None:
                    grad = grad.add(weight - self._start[place][rows], alpha=config.prox_mu)
                if self._drift is not None:
                    grad = grad + self._drift[place][rows]
                if self._velocity is not None:
                    speed = self._velocity[place][rows]
                    grad = speed.mul_(config.momentum).add_(grad)
                weight.add_(grad, alpha=-config.lr)


def check_layout(layout: Layout, start_CP: Tensor) -> None:
    """Raise a ConfigError unless stacked weights have the layout's number of parameters."""
    if start_CP.dim() != 2 or start_CP.shape[1] != layout.n_params:
        raise ConfigError("weights", tuple(start_CP.shape), f"[clients, {layout.n_params}]")
