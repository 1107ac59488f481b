"""A click stream with a known answer: Zipf popularity, planted importance, drift.

Every id belongs to an importance class drawn independently of its popularity: dummies have no
effect, "linear" ids a bias, "low" and "high" ids latent vectors of 2 and 8 dimensions that interact
across field pairs. The generator knows the true probability of every label, so the best possible
AUC and the value of every id are known too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raysys.config import check, check_range

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

CLASSES = ("dummy", "linear", "low", "high")
SHARES = (0.60, 0.20, 0.15, 0.05)
LATENT = 8
REFERENCE_ROWS = (100_000, 60_000, 30_000, 20_000, 8_000, 4_000, 1_500, 500)


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamConfig:
    """The reference stream: 8 fields, 224,000 ids, one popularity swap at half time.

    Args:
        rows: ids per field.
        exponents: Zipf exponent per field, cycled.
        signal: factor on biases and latent vectors; 1 is the weak stream, 2 the strong one.
        batch: samples per step.
        steps: steps of the stream.
        swap_at: step at which the top ``swap_share`` of ranks change places with random ranks of
            the tail; 0 for no drift.
        dummy_field: a field whose ids are all dummies, or -1.
    """

    rows: tuple[int, ...] = REFERENCE_ROWS
    exponents: tuple[float, ...] = (1.05, 1.1, 1.0, 1.2)
    signal: float = 1.0
    batch: int = 2048
    steps: int = 900
    swap_at: int = 450
    swap_share: float = 0.02
    dummy_field: int = -1
    seed: int = 0

    def __post_init__(self) -> None:
        check(self, "rows", len(self.rows) >= 2 and min(self.rows) >= 20, "2 fields of 20 ids")
        check(self, "exponents", bool(self.exponents) and min(self.exponents) > 0, "positive")
        check_range(self, "signal", 0)
        check_range(self, "batch", 1)
        check_range(self, "steps", 1)
        check_range(self, "swap_at", 0)
        check_range(self, "swap_share", 0, 0.5)
        check_range(self, "dummy_field", -1, len(self.rows) - 1)


@dataclass(frozen=True, slots=True)
class ClickBatch:
    """One step: ids [B, F], labels [B] (0 or 1) and the true probabilities [B]."""

    ids: I64
    labels: F32
    truth: F32


class PlantedStream:
    """Generates batches in order; two streams of one config give the same batches."""

    def __init__(self, config: StreamConfig) -> None:
        self.config = config
        rng = np.random.default_rng([config.seed, 1])
        self.classes = [rng.choice(4, size=n, p=SHARES).astype(np.int8) for n in config.rows]
        if config.dummy_field >= 0:
            self.classes[config.dummy_field][:] = 0
        self.order = [rng.permutation(n) for n in config.rows]
        self.tail = [np.cumsum(_zipf(n, self._exponent(f))) for f, n in enumerate(config.rows)]
        self.bias = [
            (rng.normal(size=n) * 0.45 * config.signal * (kind > 0)).astype(np.float32)
            for n, kind in zip(config.rows, self.classes)
        ]
        self.latent = [self._vectors(rng, kind) for kind in self.classes]
        fields = len(config.rows)
        self.pairs = [(f, (f + 1) % fields) for f in range(fields)]
        self._swap = np.random.default_rng([config.seed, 3])
        self._rng = np.random.default_rng([config.seed, 2])
        self.step = 0

    def __iter__(self) -> PlantedStream:
        return self

    def __next__(self) -> ClickBatch:
        if self.step >= self.config.steps:
            raise StopIteration
        if self.step and self.step == self.config.swap_at:
            self._swap_popularity()
        self.step += 1
        draws = self._rng.random((len(self.config.rows), self.config.batch))
        columns = [
            order[np.minimum(np.searchsorted(tail, u), len(order) - 1)]
            for order, tail, u in zip(self.order, self.tail, draws)
        ]
        ids = np.stack(columns, 1).astype(np.int64)
        truth = 1 / (1 + np.exp(-self.scores(ids)))
        labels = (self._rng.random(len(ids)) < truth).astype(np.float32)
        return ClickBatch(ids, labels, truth.astype(np.float32))

    def scores(self, ids: I64, without: int = -1) -> F32:
        """True log-odds [B] of samples; ``without`` removes the effect of one field."""
        biases = [b[ids[:, f]] * (f != without) for f, b in enumerate(self.bias)]
        vectors = [z[ids[:, f]] * (f != without) for f, z in enumerate(self.latent)]
        score = np.full(len(ids), -0.3, np.float32) + sum(biases)
        for one, other in self.pairs:
            score = score + np.einsum("bd,bd->b", vectors[one], vectors[other])
        return np.asarray(score, np.float32)

    def popularity(self, field: int) -> npt.NDArray[np.float64]:
        """Probability of every id of a field, as of now."""
        p = np.empty(self.config.rows[field])
        p[self.order[field]] = np.diff(self.tail[field], prepend=0.0)
        return p

    def values(self, field: int, samples: int = 200_000) -> npt.NDArray[np.float64]:
        """Value of every id: probability x expected rise of log-loss without its effect.

        Monte Carlo over ``samples`` draws of the other fields: the loss rise of a sample is the
        divergence between its true probability and the probability without the id.
        """
        rng = np.random.default_rng([self.config.seed, 4, field])
        ids = np.stack(
            [
                order[np.minimum(np.searchsorted(tail, rng.random(samples)), len(order) - 1)]
                for order, tail in zip(self.order, self.tail)
            ],
            1,
        )
        n = self.config.rows[field]
        ids[:, field] = rng.integers(0, n, samples)  # uniform: the tail needs samples too
        with_id = _sigmoid(self.scores(ids))
        without = _sigmoid(self.scores(ids, field))
        rise = with_id * np.log(with_id / without)
        rise += (1 - with_id) * np.log((1 - with_id) / (1 - without))
        count = np.bincount(ids[:, field], minlength=n)
        total = np.bincount(ids[:, field], weights=rise, minlength=n)
        kinds = self.classes[field]
        mean = np.zeros(n)
        for kind in range(4):  # a class's mean where an id was hardly sampled
            mine = kinds == kind
            average = total[mine].sum() / max(count[mine].sum(), 1)
            mean[mine] = (total[mine] + 2 * average) / (count[mine] + 2)
        mean[kinds == 0] = 0.0
        return np.asarray(mean * self.popularity(field), np.float64)

    def _exponent(self, field: int) -> float:
        return self.config.exponents[field % len(self.config.exponents)]

    def _vectors(self, rng: np.random.Generator, kinds: npt.NDArray[np.int8]) -> F32:
        z = rng.normal(size=(len(kinds), LATENT)) * 0.55 * np.sqrt(self.config.signal)
        z[kinds < 2] = 0
        z[kinds == 2, 2:] = 0
        return np.asarray(z, np.float32)

    def _swap_popularity(self) -> None:
        for order in self.order:
            top = max(1, int(len(order) * self.config.swap_share))
            other = self._swap.choice(np.arange(top, len(order)), size=top, replace=False)
            order[:top], order[other] = order[other].copy(), order[:top].copy()


def _zipf(n: int, exponent: float) -> npt.NDArray[np.float64]:
    p = np.arange(1, n + 1, dtype=np.float64) ** -exponent
    return np.asarray(p / p.sum(), np.float64)


def _sigmoid(x: F32) -> npt.NDArray[np.float64]:
    return np.asarray(1 / (1 + np.exp(-x.astype(np.float64))), np.float64)
