"""A training plan as data: an architecture's name from a fixed list, and numbers.

A device never runs code that it received. What it builds is one of the architectures below, with
sizes that it checks before anything is allocated; weights and updates travel as Arrow arrays.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from raysys.config import check_range, config_from_dict
from raysys.errors import ConfigError, DataError, RemoteError
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.model import Cnn, EmbeddingBag, Layout, Mlp, ModelSpec, layout_of
from raysys.federated.core.serialize import pack_arrays, unpack_arrays

FORMAT = 1
ARCHITECTURES: Mapping[str, type[Mlp] | type[Cnn] | type[EmbeddingBag]] = {
    "mlp": Mlp,
    "cnn": Cnn,
    "embedding_bag": EmbeddingBag,
}
PLAN_BYTES = 65_536
FACTS = ("n_samples", "loss_first", "loss_last", "steps", "seconds_per_step", "joules")


class PlanRefusedError(RemoteError):
    """A server's answer that this device will not act on; arguments as of ``RemoteError``."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PlanLimits:
    """What a device is willing to do for strangers.

    Args:
        max_params: parameters of a model. max_layers: sizes or channels in its description.
        max_steps: local steps, counted on the device's own data. max_batch: samples of a step.
        max_activations: values that a sample may become inside the network.
    """

    max_params: int = 20_000_000
    max_layers: int = 64
    max_steps: int = 100_000
    max_batch: int = 4096
    max_activations: int = 50_000_000

    def __post_init__(self) -> None:
        for name in ("max_params", "max_layers", "max_steps", "max_batch", "max_activations"):
            check_range(self, name, 1)

    @property
    def max_model_bytes(self) -> int:
        """Largest model or update on the wire: float32 and a little for the frame."""
        return 4 * self.max_params + 65_536


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a device is asked to train.

    Args:
        client: the number under which the job knows this device; it selects the batches.
        seed, round_id: of the job; together with ``client`` they fix every random draw.
        clip_norm: longest update that the device sends; 0 for no clipping.
    """

    spec: ModelSpec
    local: LocalConfig
    client: int
    seed: int = 0
    round_id: int = 0
    version: int = 0
    clip_norm: float = 0.0

    def __post_init__(self) -> None:
        for name in ("client", "seed", "round_id", "version", "clip_norm"):
            check_range(self, name, 0)


def plan_to_json(plan: Plan) -> str:
    """Write a plan.

    Raises:
        ConfigError: the architecture is not one that devices build.
    """
    names = {kind: name for name, kind in ARCHITECTURES.items()}
    kind = type(plan.spec.architecture)
    if kind not in names:
        known = ", ".join(ARCHITECTURES)
        raise ConfigError("model", kind.__name__, f"one of {known}", "Devices run no other code")
    return json.dumps(
        {
            "format": FORMAT,
            "architecture": names[kind],
            "sizes": dataclasses.asdict(plan.spec.architecture),
            "task": plan.spec.task,
            "local": dataclasses.asdict(plan.local),
            "client": plan.client,
            "seed": plan.seed,
            "round": plan.round_id,
            "version": plan.version,
            "clip_norm": plan.clip_norm,
        },
        separators=(",", ":"),
    )


def plan_from_json(text: str, limits: PlanLimits, peer: str = "server") -> Plan:
    """Read a plan that came from outside.

    Raises:
        PlanRefusedError: not a plan, an unknown architecture, or more than the limits allow.
    """

    def refuse(reason: str) -> PlanRefusedError:
        return PlanRefusedError(peer, f"plan refused: {reason}", "The device goes on without it")

    if len(text) > PLAN_BYTES:
        raise refuse(f"{len(text)} bytes, at most {PLAN_BYTES}")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refuse("not JSON") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise refuse(f"not of format {FORMAT}")
    kind = ARCHITECTURES.get(str(values.get("architecture")))
    if kind is None:
        raise refuse(f"unknown architecture {values.get('architecture')!r}")
    try:
        architecture = config_from_dict(kind, _mapping(values, "sizes"))
        _check_size(architecture, limits)
        plan = Plan(
            spec=ModelSpec(architecture=architecture, task=values.get("task", "classification")),
            local=config_from_dict(LocalConfig, _mapping(values, "local")),
            client=_whole(values, "client"),
            seed=_whole(values, "seed"),
            round_id=_whole(values, "round"),
            version=_whole(values, "version"),
            clip_norm=float(values.get("clip_norm", 0.0)),
        )
    except (ConfigError, TypeError, ValueError) as error:
        raise refuse(str(error)) from error
    if plan.local.batch_size > limits.max_batch:
        raise refuse(f"batches of {plan.local.batch_size}, at most {limits.max_batch}")
    return plan


def check_work(plan: Plan, n_samples: int, limits: PlanLimits, peer: str = "server") -> int:
    """Local steps that a plan means on this device's data.

    Raises:
        PlanRefusedError: more steps than the limits allow, or no data to train on.
    """
    steps = int(plan.local.steps_of(np.array([n_samples], dtype=np.int64))[0])
    if not 0 < steps <= limits.max_steps:
        reason = f"plan refused: {steps} steps on {n_samples} samples, 1 to {limits.max_steps}"
        raise PlanRefusedError(peer, reason, "The device goes on without it")
    return steps


def pack_weights(values: npt.NDArray[np.float32]) -> bytes:
    """A model for the wire."""
    return pack_arrays({"weights": np.asarray(values, dtype=np.float32)})


def unpack_weights(
    content: bytes, spec: ModelSpec, peer: str = "server"
) -> npt.NDArray[np.float32]:
    """Read a model that came from outside, float32 [P].

    Raises:
        PlanRefusedError: damaged, of another shape or type, or not finite.
    """

    def refuse(reason: str) -> PlanRefusedError:
        return PlanRefusedError(peer, f"model refused: {reason}", "The device goes on without it")

    try:
        arrays = unpack_arrays(content, peer)
    except (DataError, ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise refuse(str(error)) from error
    weights = arrays.get("weights")
    wanted = (layout_of(spec).n_params,)
    if weights is None or weights.dtype != np.float32 or weights.shape != wanted:
        shape = None if weights is None else (str(weights.dtype), weights.shape)
        raise refuse(f"weights are {shape}, float32 {wanted} expected")
    if not np.isfinite(weights).all():
        raise refuse("weights hold NaN or infinity")
    return weights


def pack_update(delta: npt.NDArray[np.float32], facts: Mapping[str, float]) -> bytes:
    """An update for the wire: the change of the weights, and numbers about the training."""
    row = np.array([facts[name] for name in FACTS], dtype=np.float64)
    return pack_arrays({"delta": np.asarray(delta, dtype=np.float32), "facts": row})


def unpack_update(
    content: bytes, layout: Layout, peer: str = "device"
) -> tuple[npt.NDArray[np.float32], dict[str, float]]:
    """Read an update that came from a device; finiteness of the change is for the screen.

    Raises:
        DataError: damaged or of another shape, or facts that cannot be.
    """
    arrays = unpack_arrays(content, peer)
    delta, row = arrays.get("delta"), arrays.get("facts")
    if delta is None or delta.dtype != np.float32 or delta.shape != (layout.n_params,):
        raise DataError(peer, f"update is not float32 ({layout.n_params},)", "")
    if row is None or row.dtype != np.float64 or row.shape != (len(FACTS),):
        raise DataError(peer, f"facts are not float64 ({len(FACTS)},)", "")
    facts = dict(zip(FACTS, (float(value) for value in row)))
    for name, least in (("n_samples", 1.0), ("steps", 0.0)):
        if not least <= facts[name] <= 1e9:
            raise DataError(peer, f"claims {name} {facts[name]}", "")
    return delta, facts


def _check_size(architecture: Mlp | Cnn | EmbeddingBag, limits: PlanLimits) -> None:
    """Refuse by arithmetic on the description, before a module is built."""
    layers, params, inner = _COUNTERS[type(architecture)](architecture)
    if layers > limits.max_layers:
        raise ConfigError("layers", layers, f"at most {limits.max_layers}")
    if params > limits.max_params:
        raise ConfigError("parameters", params, f"at most {limits.max_params}")
    if inner > limits.max_activations:
        raise ConfigError("activations", inner, f"at most {limits.max_activations}")


def _count_mlp(mlp: Mlp) -> tuple[int, int, int]:
    params = sum(a * b + b for a, b in zip(mlp.sizes, mlp.sizes[1:]))
    return len(mlp.sizes), params, sum(mlp.sizes)


def _count_cnn(cnn: Cnn) -> tuple[int, int, int]:
    depth, height, width = cnn.image
    params, inner = 0, depth * height * width
    for channels in cnn.channels:
        if min(channels, depth, height, width) < 1:
            raise ConfigError("sizes", cnn.channels, "sizes of at least 1")
        params += 9 * depth * channels + channels
        inner += channels * height * width
        depth, height, width = channels, height // 2, width // 2
    flat = _count_mlp(Mlp(sizes=(max(depth * height * width, 1), *cnn.hidden, cnn.classes)))
    return len(cnn.channels) + flat[0], params + flat[1], inner + flat[2]


def _count_bag(bag: EmbeddingBag) -> tuple[int, int, int]:
    params = bag.vocabulary * bag.dim + (bag.dim + 1) * bag.classes
    return 2, params, bag.dim + bag.classes


_COUNTERS: Mapping[type, Callable[[Any], tuple[int, int, int]]] = {
    Mlp: _count_mlp,
    Cnn: _count_cnn,
    EmbeddingBag: _count_bag,
}


def _mapping(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = values.get(name)
    if not isinstance(found, dict):
        raise ConfigError(name, found, "an object")
    return found


def _whole(values: Mapping[str, Any], name: str) -> int:
    found = values.get(name)
    if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found < 2**63:
        raise ConfigError(name, found, "a whole number from 0")
    return found
