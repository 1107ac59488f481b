"""What travels between the job and its workers: tasks out, partial sums back. Arrays, no objects.

Dimensions: k clients of a task, K models of a round, P parameters, D sketch dimensions.
"""

from __future__ import annotations

import dataclasses
import enum

import numpy as np
import numpy.typing as npt

from raysys.config import check, check_choice, check_range
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.model import ModelSpec

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Float32Array = npt.NDArray[np.float32]


class Status(enum.IntEnum):
    """What became of a client's update."""

    OK = 0
    EMPTY = 1  # the client has no samples
    NONFINITE = 2  # the update held NaN or infinity
    REJECTED = 3  # the update's norm was far above the usual
    LATE = 4  # the answer came after the round closed
    FAILED = 5  # the device vanished


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FeedbackSpec:
    """What a strategy wants folded and reported.

    Args:
        weighting: "samples" (n_k), "uniform" (1), or "loss" (q-FedAvg's F_k^q).
        q: exponent of the "loss" weighting.
        sketch_dim: size of each client's sketch; 0 for none.
        sketch_density: non-zeros of the projection per parameter.
        controls: whether clients carry SCAFFOLD control variates.
        halves: also sketch the update after the first half of each client's steps. Left out where
            noise is added: a second release of the same update would not be covered by it.
        sketch_tail: sketch only this last share of the flat update; 1 takes all of it.
        update_group: clients whose mean update travels back on its own, for robust rules: 1 is
            every single update (memory: clients x parameters), 0 is none.
    """

    weighting: str = "samples"
    q: float = 0.0
    sketch_dim: int = 0
    sketch_density: int = 3
    controls: bool = False
    halves: bool = False
    sketch_tail: float = 1.0
    update_group: int = 0

    def __post_init__(self) -> None:
        check_choice(self, "weighting", ("samples", "uniform", "loss"))
        check_range(self, "q", 0)
        check_range(self, "sketch_dim", 0, 65536)
        check_range(self, "sketch_density", 1, 16)
        check_range(self, "sketch_tail", 0, 1, low_open=True)
        check_range(self, "update_group", 0)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ScreenConfig:
    """Which updates are folded.

    Args:
        clip_norm: longest update; longer ones are scaled down to it. None leaves them.
        reject_factor: an update longer than this many running median norms is dropped. None
            keeps all. A first round has no median yet and drops only non-finite updates.
        min_fraction: a round that keeps a smaller share of its demand is repeated.
        local_noise: standard deviation of Gaussian noise that each client adds to its clipped
            update before anything leaves it; its loss and norm then stay with it.
    """

    clip_norm: float | None = None
    reject_factor: float | None = 10.0
    min_fraction: float = 0.8
    local_noise: float = 0.0

    def __post_init__(self) -> None:
        if self.clip_norm is not None:
            check(self, "clip_norm", self.clip_norm > 0, "None or a number above 0")
        if self.reject_factor is not None:
            check(self, "reject_factor", self.reject_factor > 1, "None or a number above 1")
        check_range(self, "min_fraction", 0, 1)
        check_range(self, "local_noise", 0)
        bounded = self.local_noise == 0 or self.clip_norm is not None
        check(self, "local_noise", bounded, "0 without clip_norm", "Noise hides bounded updates")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainTask:
    """Train some clients of one round; the result is a pure function of this and the weights.

    Args:
        clients: int64 [k]. rows: int64 [k], the row of the round's stacked weights of each.
        models: K, number of rows of the stacked weights.
        rung, chunk_size: how the worker runs it.
        reject_above: norm above which an update is dropped; infinite for never.
        local_noise: standard deviation of Gaussian noise added to each clipped update.
    """

    round_id: int
    attempt: int
    task_id: int
    spec: ModelSpec
    clients: IntArray
    rows: IntArray
    models: int
    local: LocalConfig
    feedback: FeedbackSpec
    seed: int
    rung: str
    chunk_size: int
    clip_norm: float | None = None
    reject_above: float = float("inf")
    local_noise: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Partial:
    """The answer to a task: one sum per model, and a small table with a row per client.

    Args:
        present: rows of the stacked weights that this task trained, int64 [R], rising.
        sum_delta: weighted sums of updates, [R, P]: float64, or float32 where that says it all (a
            task of one chunk). sum_weight: of weights, float64 [R].
        sum_scalar: the denominators of q-FedAvg, float64 [R]; zero otherwise.
        loss_first, loss_last, norm: float32 [k]; the norm is that before clipping.
        n_samples: int64 [k]. status: int8 [k]. sketch, sketch_half: float32 [k, D] or None.
        controls: change of each client's SCAFFOLD control variate, float32 [k, P], or None.
        updates: mean update of each group of clients, float32 [U, P], or None; row k is client k
            where groups are single clients. update_weight: summed weight, float64 [U], 0 where
            nothing was kept. update_row: row of the stacked weights, int64 [U].
        busy_s: CPU seconds the worker spent, for balance and reports only.
    """

    round_id: int
    attempt: int
    task_id: int
    spec_id: str
    clients: IntArray
    rows: IntArray
    present: IntArray
    sum_delta: Float32Array | FloatArray
    sum_weight: FloatArray
    sum_scalar: FloatArray
    loss_first: Float32Array
    loss_last: Float32Array
    norm: Float32Array
    n_samples: IntArray
    status: npt.NDArray[np.int8]
    sketch: Float32Array | None = None
    sketch_half: Float32Array | None = None
    controls: Float32Array | None = None
    updates: Float32Array | None = None
    update_weight: FloatArray | None = None
    update_row: IntArray | None = None
    busy_s: float = 0.0

    @property
    def key(self) -> tuple[int, int, int]:
        """Identity of the task; two partials of one key are duplicates."""
        return self.round_id, self.attempt, self.task_id
