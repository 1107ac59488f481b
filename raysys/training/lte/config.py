"""Options of a conversion and of a training stage.

Source: Zheng et al., "Learn To be Efficient", NeurIPS 2024 (LTE), sections 4.1 to 4.3. Values
that the paper leaves open (epsilon, the ramp of lambda, the router's start) are ours and say so.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from raysys.training.lte.errors import LTEConfigError

Grouping = Literal["kmeans", "random", "order", "coactivation"]
RouterInit = Literal["default", "warm"]
Scope = Literal["all", "ffn_and_router", "lora+router"]
LambdaSchedule = Literal["ramp", "constant"]
GROUPINGS = ("kmeans", "random", "order", "coactivation")
MIN_EPSILON = 1e-6
FORMAT_VERSION = 1


def require(field: str, value: Any, condition: bool, expected: str, remedy: str = "") -> None:
    """Raise :class:`LTEConfigError` unless the condition holds."""
    if not condition:
        raise LTEConfigError(field, value, expected, remedy)


def _finite(config: Any, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        require(field, value, math.isfinite(value) and value >= 0, "a finite number >= 0")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    """How a dense model becomes an LTE model.

    Args:
        expert_size: neurons per expert, E.
        threshold: tau; an expert is on when its score is strictly above.
        grouping: ``"kmeans"`` on the input weights (paper), or an ablation.
        router_init: ``"default"`` is torch's linear start without a bias (closest to the paper);
            ``"warm"`` draws N(0, 0.01) weights and a positive bias, so that nearly all experts
            start switched on (ours).
        warm_bias: the bias of ``"warm"``, in logits.
        seed: of the clustering and of the routers' start.
    """

    expert_size: int = 32
    threshold: float = 0.5
    grouping: Grouping = "kmeans"
    router_init: RouterInit = "default"
    warm_bias: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        require("expert_size", self.expert_size, self.expert_size > 0, "a whole number above 0")
        ok = math.isfinite(self.threshold) and 0.0 < self.threshold < 1.0
        require("threshold", self.threshold, ok, "a number in (0, 1)")
        require("grouping", self.grouping, self.grouping in GROUPINGS, f"one of {GROUPINGS}")
        known = self.router_init in ("default", "warm")
        require("router_init", self.router_init, known, "'default' or 'warm'")
        require("warm_bias", self.warm_bias, math.isfinite(self.warm_bias), "a finite number")

    @property
    def router_bias(self) -> bool:
        return self.router_init == "warm"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """One training stage (section 4.3).

    Args:
        stage: 1 trains model and routers with soft scores; 2 freezes the routers and trains the
            model with hard selection; 0 is plain fine-tuning of the dense model (the control).
        eta: efficiency coefficient; where ``target_sparsity`` is set, where it starts.
        target_sparsity: wanted FFN sparsity in [0, 1); None keeps eta fixed (paper). In stage 2 the
            threshold lands on it once more at the end, as the model moves under frozen routers.
        lam: separability coefficient at its full height.
        eps: added to the squared distance in the separability loss; ours, not optional.
        lam_schedule: ``"ramp"`` is 0 for half of stage 1 and reaches ``lam`` at 80 % (ours);
            ``"constant"`` is the paper.
        scope: which weights train beside the routers.
        lr, weight_decay: of the model.
        router_lr, router_weight_decay: of the routers, in an AdamW group of their own.
        steps: optimiser steps.
        batch: sequences per step over all workers.
        warmup: share of the steps in which the rate rises; it falls linearly to 0 afterwards.
        clip: largest global gradient norm (ours).
        distil: weight of the KL to the dense model's output, 0 to 1; the task loss gets the rest.
        temperature: of the distillation.
        threshold_offsets: offsets of the threshold in logits, one drawn per step in stage 2, so
            that one checkpoint serves several budgets (ours); ``(0.0,)`` is the paper.
        lora_rank: rank of the adapters of scope ``"lora+router"``.
        seed: of the order of the data, of dropout and of the offsets.
        bf16: compute under bfloat16 autocast; weights, routers and losses stay float32.
    """

    stage: int = 1
    eta: float = 0.5
    target_sparsity: float | None = None
    lam: float = 0.05
    eps: float = 1e-2
    lam_schedule: LambdaSchedule = "ramp"
    scope: Scope = "all"
    lr: float = 5e-5
    weight_decay: float = 0.0
    router_lr: float = 1e-2
    router_weight_decay: float = 0.1
    steps: int = 200
    batch: int = 8
    warmup: float = 0.06
    clip: float = 1.0
    distil: float = 0.0
    temperature: float = 1.0
    threshold_offsets: tuple[float, ...] = (0.0,)
    lora_rank: int = 8
    seed: int = 0
    bf16: bool = False

    def __post_init__(self) -> None:
        require("stage", self.stage, self.stage in (0, 1, 2), "0, 1 or 2")
        _finite(self, "eta", "lam", "eps", "lr", "weight_decay", "router_lr", "router_weight_decay")
        _finite(self, "warmup", "clip", "distil", "temperature")
        if self.lam > 0:
            remedy = "The loss is singular at the threshold; 1e-2 is a good value"
            require("eps", self.eps, self.eps >= MIN_EPSILON, f"at least {MIN_EPSILON}", remedy)
        if self.target_sparsity is not None:
            wanted = self.target_sparsity
            ok = math.isfinite(wanted) and 0.0 <= wanted < 1.0
            require("target_sparsity", wanted, ok, "a number in [0, 1)")
        schedule = self.lam_schedule in ("ramp", "constant")
        require("lam_schedule", self.lam_schedule, schedule, "'ramp' or 'constant'")
        scopes = ("all", "ffn_and_router", "lora+router")
        require("scope", self.scope, self.scope in scopes, f"one of {scopes}")
        for field in ("steps", "batch", "lora_rank"):
            require(field, getattr(self, field), getattr(self, field) >= 1, "at least 1")
        require("warmup", self.warmup, self.warmup < 1, "a share in [0, 1)")
        require("distil", self.distil, self.distil <= 1, "a share in [0, 1]")
        require("temperature", self.temperature, self.temperature > 0, "a number above 0")
        offsets = bool(self.threshold_offsets) and all(map(math.isfinite, self.threshold_offsets))
        require("threshold_offsets", self.threshold_offsets, offsets, "one or more finite numbers")

    def lambda_at(self, step: int) -> float:
        """Separability coefficient at a step of stage 1."""
        if self.lam_schedule == "constant":
            return self.lam
        done = step / self.steps
        return self.lam * min(1.0, max(0.0, (done - 0.5) / 0.3))

    def rate_at(self, step: int) -> float:
        """Factor on the learning rates at a step: linear rise, then linear fall."""
        rise = max(1, round(self.warmup * self.steps))
        if step < rise:
            return (step + 1) / rise
        return (self.steps - step) / max(1, self.steps - rise)


def threshold_logit(threshold: float) -> float:
    """``sigmoid(z) > threshold`` is ``z > threshold_logit(threshold)``; 0 at one half."""
    return math.log(threshold / (1.0 - threshold))
