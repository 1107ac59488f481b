"""LTE tuned on a coreset that CCS chose, as a program."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jobs.bench.compose import tuning
from jobs.bench.pieces import Piece
from jobs.compose.composition import Composition, Measure, Row
from raysys.compose.coreset_tuning import TuningConfig
from raysys.config import check, check_range


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The text, the parts and the model.

    Args:
        blocks: of text, drawn by the seed; a multiple of ``tuning.model.batch``.
        keeps: shares of the blocks that a part has. beta: CCS's cutoff; null takes its default.
        tuning: the model and how long it trains.
        seeds: how many seeds, from ``seed`` on.
    """

    blocks: int = 2048
    keeps: tuple[float, ...] = (0.1, 0.3)
    beta: float | None = None
    tuning: TuningConfig = dataclasses.field(
        default_factory=lambda: TuningConfig(model=tuning.SMALL)
    )
    seeds: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_range(self, "blocks", 1)
        batch = self.tuning.model.batch
        check(self, "blocks", self.blocks % batch == 0, f"a multiple of the batch, {batch}")
        usable = bool(self.keeps) and all(batch / self.blocks <= k < 1 for k in self.keeps)
        check(self, "keeps", usable, "shares below 1 that keep a batch of blocks at least")
        if self.beta is not None:
            check_range(self, "beta", 0, 1, high_open=True)
            left = max(self.keeps) <= 1 - self.beta
            check(self, "beta", left, f"at most {1 - max(self.keeps):g}", "Or keep less")
        check_range(self, "seeds", 1)


def _pieces(config: Config) -> Sequence[Piece]:
    return [
        tuning.Case(
            seed=seed, blocks=config.blocks, keeps=config.keeps, beta=config.beta,
            tuning=config.tuning,
        ).piece()
        for seed in range(config.seed, config.seed + config.seeds)
    ]  # fmt: skip


def _rows(found: dict[str, Any]) -> Sequence[Row]:
    kept = {key: found[key] for key in ("seed", "data", "base_cpu_s", "recording_cpu_s")}
    return [{"arm": arm, **kept, **values} for arm, values in found["arms"].items()]


CCS_IN_LTE_TUNING = Composition(
    name="ccs_in_lte_tuning",
    title="CCS inside LTE's tuning",
    problem="Both stages of LTE see a coreset of the text alone, which CCS chose from the dense "
    "model's training dynamics; against as large a random part, the hardest blocks and the whole.",
    config=Config,
    pieces=_pieces,
    rows=_rows,
    measures=(
        Measure(name="nll", heading="held-out nats per byte", digits=4, better="lower"),
        Measure(name="sparsity", heading="FFN sparsity"),
        Measure(name="steps", heading="steps", digits=0),
        Measure(name="seconds", heading="tuning, CPU s", digits=2, better="lower"),
    ),
    notes=(
        "An arm begins with the share of the blocks that it keeps; few steps: as many epochs over "
        "the part as the whole set gets, other arms get the whole set's steps.",
        "Tuning is without evaluation, and without the dense model's training that scores.",
    ),
)
