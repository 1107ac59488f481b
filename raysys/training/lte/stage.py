"""One training stage as a loop that can stop and go on at any step (section 4.3).

A step is a function of the state and its number: order of the data, dropout and drawn
thresholds come from counters, so a resumed run equals one that was never interrupted. Losses
are sums divided by *global* counts, so the gradient does not depend on how the batch was split
over workers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from raysys.training.lte import sharding
from raysys.training.lte.config import StageConfig, threshold_logit
from raysys.training.lte.controller import ControllerConfig, SparsityController
from raysys.training.lte.errors import LTEConfigError, LTEDataError
from raysys.training.lte.gating import Mode, Selector, SparseModel
from raysys.training.lte.losses import (
    IGNORED,
    distillation_sum,
    efficiency_sum,
    separability_floor,
    separability_sum,
    stack_scores,
    token_loss_sum,
)
from raysys.training.lte.scopes import apply_scope, parameter_groups
from raysys.training.lte.text import Batch

AllReduce = Callable[[Tensor], None]
STAGE_MODE: dict[int, Mode] = {0: "dense", 1: "soft", 2: "hard"}
NEAR = 0.1  # a score this close to the threshold counts as undecided


class Batches(Protocol):
    """What a stage trains on; see :class:`~raysys.training.lte.text.TokenBlocks`."""

    def batch(self, step: int, batch: int, seed: int, rank: int, world: int) -> Batch: ...


def shift(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and labels that belong together: a language model predicts the next token."""
    if logits.ndim == 3 and labels.ndim == 2:
        return logits[:, :-1], labels[:, 1:]
    return logits, labels


class Stage:
    """A stage in progress.

    Args:
        sparse: the model with its gates.
        data: batches by step.
        config: the stage's options.
        teacher: frozen dense model for distillation.
        controller: options of the target-sparsity controller.
        rank, world, reduce: place among the workers, and an in-place sum over them.
        mode: selection while training; by default the stage's own.
        selectors: another selection per layer (the baselines), instead of a mode.
        shard: spread weights, gradients and optimiser states over the workers (``sharding.py``);
            gradients are then summed there and not by ``reduce``, and every worker must call
            :meth:`state_dict`.

    Raises:
        LTEConfigError: distillation without a teacher, or fewer sequences than workers.
    """

    def __init__(
        self,
        sparse: SparseModel,
        data: Batches,
        config: StageConfig,
        *,
        teacher: nn.Module | None = None,
        controller: ControllerConfig | None = None,
        rank: int = 0,
        world: int = 1,
        reduce: AllReduce | None = None,
        mode: Mode | None = None,
        selectors: Sequence[Selector] | None = None,
        shard: bool = False,
    ) -> None:
        if config.distil > 0 and teacher is None:
            raise LTEConfigError("distil", config.distil, "0 without a teacher model")
        if config.batch < world:
            raise LTEConfigError(
                "batch", config.batch, f"at least one sequence for {world} workers"
            )
        self.sparse, self.data, self.config, self.teacher = sparse, data, config, teacher
        self.rank, self.world, self.reduce = rank, world, reduce
        self.mode = mode or STAGE_MODE[config.stage]
        self.selectors = selectors
        self.step = 0
        self.last_saved: int | None = None
        self.log: list[dict[str, Any]] = []
        self.threshold = 1.0 / (1.0 + math.exp(-sparse.gates[0].threshold))
        apply_scope(sparse, config)
        self.sharded = shard
        if shard:
            sharding.shard(sparse)
        self.optimizer = torch.optim.AdamW(parameter_groups(sparse, config))
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self.controller = self._controller(controller)
        self._on = [torch.zeros(gate.experts) for gate in sparse.gates]
        self._tokens = 0

    def _controller(self, options: ControllerConfig | None) -> SparsityController | None:
        wanted = self.config.target_sparsity
        if wanted is None or self.config.stage != 1:
            return None
        return SparsityController(wanted, self.config.eta, self.config.steps, options)

    @property
    def done(self) -> bool:
        return self.step >= self.config.steps

    @property
    def eta(self) -> float:
        """Efficiency coefficient of the next step."""
        return self.controller.eta if self.controller else self.config.eta

    def run(
        self, until: int | None = None, on_step: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        """Train up to step ``until`` (default: to the end).

        Raises:
            LTEDataError: a loss is not finite, or a batch has nothing to learn from.
        """
        end = self.config.steps if until is None else min(until, self.config.steps)
        self.sparse.model.train()
        while self.step < end:
            row = self._one()
            self.log.append(row)
            if on_step is not None:
                on_step(row)

    def _one(self) -> dict[str, Any]:
        config, sparse = self.config, self.sparse
        torch.manual_seed((config.seed * 1_000_003 + self.step) * 64 + self.rank)
        batch = self.data.batch(self.step, config.batch, config.seed, self.rank, self.world)
        sparse.set_mode(self.mode, offset=self._offset())
        if self.selectors is not None:
            sparse.set_selectors(self.selectors)
        for group, rate in zip(self.optimizer.param_groups, self._rates):
            group["lr"] = rate * config.rate_at(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss, row = self._loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        self._exchange()
        row |= self._clip()
        self.optimizer.step()
        row["eta"] = self.eta
        if self.controller is not None:
            self.controller.observe(self.step, row["sparsity"])
        self.step += 1
        return row

    def _offset(self) -> float:
        offsets = self.config.threshold_offsets
        if self.config.stage != 2 or len(offsets) == 1:
            return offsets[0] if self.config.stage == 2 else 0.0
        pick = np.random.default_rng((self.config.seed, self.step, 7)).integers(len(offsets))
        return offsets[int(pick)]

    def _forward(self, batch: Batch) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        context: Any = contextlib.nullcontext()
        if self.config.bf16:
            context = torch.autocast(batch.labels.device.type, dtype=torch.bfloat16)
        with context, self.sparse.recording() as records:
            logits = self.sparse.model(**batch.inputs).logits
        return logits, [r[0][0] for r in records if r], [r[0][1] for r in records if r]

    def _loss(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        """The rank's share of the global mean loss, and the global figures of the step."""
        config = self.config
        output, router_logits, weights = self._forward(batch)
        logits, labels = shift(output, batch.labels)
        count = (labels != IGNORED).sum()
        tokens = (
            batch.valid.sum()
            if batch.valid is not None
            else torch.tensor(batch.labels.numel() if output.ndim == 3 else _tokens(batch))
        )
        counts = torch.stack([count, tokens]).double()
        self._sum(counts)
        if counts[0] == 0:
            reason = f"step {self.step}: every label is ignored"
            raise LTEDataError("labels", reason, "Give labels other than -100")
        task = token_loss_sum(logits, labels) / counts[0]
        loss = task
        if config.distil > 0:
            loss = (1 - config.distil) * task + config.distil * self._distil(
                batch, output, counts[0]
            )
        figures = [task.detach()]
        if router_logits and config.stage == 1:
            scores = stack_scores(router_logits, batch.valid)
            efficiency = efficiency_sum(scores) / counts[1]
            separability = separability_sum(scores, self.threshold, config.eps) / counts[1]
            loss = loss + self.eta * efficiency + config.lambda_at(self.step) * separability
            figures += [efficiency.detach(), separability.detach()]
        return loss.float(), self._figures(figures, router_logits, weights, batch, float(counts[1]))

    def _distil(self, batch: Batch, output: Tensor, count: Tensor) -> Tensor:
        assert self.teacher is not None
        with torch.no_grad():
            theirs = self.teacher(**batch.inputs).logits
        mine, labels = shift(output, batch.labels)
        theirs, _ = shift(theirs, batch.labels)
        return distillation_sum(mine, theirs, labels != IGNORED, self.config.temperature) / count

    @torch.no_grad()
    def _figures(
        self, losses: Sequence[Tensor], logits: Sequence[Tensor], weights: Sequence[Tensor],
        batch: Batch, tokens: float,
    ) -> dict[str, Any]:  # fmt: skip
        cut = threshold_logit(self.threshold)
        on = [self._valid(z, batch) > cut for z in logits]
        if self.mode == "topk" or self.selectors is not None:
            on = [self._valid(w, batch) != 0 for w in weights]
        active = [mask.sum(dtype=torch.float64) for mask in on]
        near = [
            (torch.sigmoid(self._valid(z, batch)) - self.threshold).abs().lt(NEAR).sum()
            for z in logits
        ]
        summed = torch.stack([*(v.double() for v in losses), *active, *(v.double() for v in near)])
        self._sum(summed)
        if not bool(torch.isfinite(summed).all()):
            last = (
                "none was saved"
                if self.last_saved is None
                else f"the last is of step {self.last_saved}"
            )
            remedy = f"Go on from a checkpoint ({last}) with a smaller lr or eta"
            raise LTEDataError("loss", f"not finite at step {self.step}", remedy)
        self._tokens += len(on[0].flatten(0, -2)) if on else 0
        for layer, mask in enumerate(on):
            self._on[layer] += mask.flatten(0, -2).sum(0).cpu()
        values, rest = summed[: len(losses)].tolist(), summed[len(losses) :].tolist()
        row: dict[str, Any] = {"step": self.step, "loss": values[0]}
        if len(values) == 3:
            floor = separability_floor(self.threshold, self.config.eps)
            row |= {"efficiency": values[1], "separability_excess": values[2] - floor}
            row["lambda"] = self.config.lambda_at(self.step)
        if active:
            sizes = [tokens * z.shape[-1] for z in logits]
            row["sparsity"] = 1.0 - sum(rest[: len(active)]) / sum(sizes)
            row["density"] = [a / s for a, s in zip(rest, sizes)]
            row["near"] = sum(rest[len(active) :]) / sum(sizes)
        return row

    @staticmethod
    def _valid(z: Tensor, batch: Batch) -> Tensor:
        flat = z.flatten(0, -2)
        return flat if batch.valid is None else flat[batch.valid.flatten()]

    def expert_use(self) -> dict[str, int]:
        """Experts that this rank has never seen on (dead) or never off (stuck) in this stage."""
        return {
            "dead": int(sum((total == 0).sum() for total in self._on)),
            "stuck": int(sum((total == self._tokens).sum() for total in self._on)),
        }

    def _sum(self, values: Tensor) -> None:
        if self.reduce is not None:
            self.reduce(values)

    def _exchange(self) -> None:
        """Sum the gradients over the workers; shares of a global mean add up to the whole."""
        if self.reduce is None or self.sharded:
            return
        for parameter in self.sparse.model.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                self.reduce(parameter.grad)

    def _clip(self) -> dict[str, float]:
        routers = {id(p) for router in self.sparse.routers for p in router.parameters()}
        trained = [p for p in self.sparse.model.parameters() if p.grad is not None]
        norms = {
            "grad_norm": _norm([p for p in trained if id(p) not in routers]),
            "router_grad_norm": _norm([p for p in trained if id(p) in routers]),
        }
        if self.config.clip > 0:
            total = sharding.whole(nn.utils.clip_grad_norm_(trained, self.config.clip))
            if not bool(torch.isfinite(total)):
                raise LTEDataError(
                    "gradient",
                    f"not finite at step {self.step}",
                    "Use a smaller lr or a larger eps",
                )
        return norms

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs; tensors are shared with the live model."""
        model: Any = self.sparse.model
        return {
            "step": self.step,
            "model": sharding.model_state(model) if self.sharded else model.state_dict(),
            "optimizer": sharding.optimizer_state(model, self.optimizer)
            if self.sharded
            else self.optimizer.state_dict(),
            "controller": self.controller.state_dict() if self.controller else None,
            "on": self._on,
            "tokens": self._tokens,
            "log": self.log,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; the number of workers may differ."""
        if self.sharded:
            sharding.load(self.sparse.model, self.optimizer, state)
        else:
            self.sparse.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        if self.controller is not None and state["controller"] is not None:
            self.controller.load_state_dict(state["controller"])
        self.step = self.last_saved = state["step"]
        self._on = [total.clone() for total in state["on"]]
        self._tokens = state["tokens"]
        self.log = list(state["log"])


def _tokens(batch: Batch) -> int:
    return next(iter(batch.inputs.values())).numel()


def _norm(parameters: Sequence[Tensor]) -> float:
    found = [p.grad.detach().float().norm() for p in parameters if p.grad is not None]
    gradients = [sharding.whole(norm) for norm in found]
    return float(torch.stack(gradients).norm()) if gradients else 0.0
