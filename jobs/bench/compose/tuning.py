"""LTE tuned on a coreset by CCS, on as large a random part, on the hardest, and on the whole."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from jobs.bench.lte.quality import QUICK, text
from jobs.bench.pieces import Piece, measure_pieces
from raysys.bench import Baseline, Claim, Profile
from raysys.compose.coreset_tuning import TuningConfig, subset, train_and_score, tune
from raysys.errors import ConfigError
from raysys.training.ccs.baselines import CCS, HardestFirst, Method, Random
from raysys.training.ccs.selection import coreset_size, default_beta
from raysys.training.lte.text import TokenBlocks, to_bytes

METHODS = ("ccs", "random", "hardest")
SMALL = dataclasses.replace(QUICK, held_out=256)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One seed of all arms.

    Args:
        blocks: of text, drawn from the training part of the corpus by the seed.
        keeps: shares of the blocks in a part. beta: CCS's cutoff; None takes its default.
        tuning: the model and how long it trains.
    """

    seed: int
    blocks: int = 2048
    keeps: tuple[float, ...] = (0.1, 0.3)
    beta: float | None = None
    tuning: TuningConfig = dataclasses.field(default_factory=lambda: TuningConfig(model=SMALL))

    def piece(self) -> Piece:
        """The run, by itself."""
        key = dataclasses.asdict(self)
        return Piece(f"tuning-{self.seed}", key, functools.partial(run_case, self))


def ccs_in_lte_tuning(profile: Profile) -> Claim:
    """Held-out nats of LTE tuned on a CCS coreset minus those on a random part, equal steps."""
    blocks, keeps, seeds = profile.pick((512, (0.3,), range(1)), (2048, (0.1, 0.3), range(5)))
    cases = [Case(seed=seed, blocks=blocks, keeps=keeps) for seed in seeds]
    rows = measure_pieces(profile.partial, [case.piece() for case in cases])
    table = _means(rows)
    gaps = {f"{keep:g}": [_gap(row, f"{keep:g} ccs", f"{keep:g} random") for row in rows]
            for keep in keeps}  # fmt: skip
    last = f"{keeps[-1]:g}"
    return Claim(
        name="ccs_in_lte_tuning",
        value=statistics.mean(gaps[last]),
        unit=f"nats per byte, CCS minus random, {last} of the text, equal steps",
        better="lower",
        baseline=Baseline(
            name="the whole set",
            value=statistics.mean(_gap(row, "whole", f"{last} random") for row in rows),
        ),
        samples={"table": table, "rows": rows, "gaps": gaps},
        seeds=list(seeds),
    )


def run_case(case: Case) -> dict[str, Any]:
    """All arms of one seed, from one dense model.

    Raises:
        ConfigError: more blocks than the corpus has.
    """
    torch.set_num_threads(1)
    train, held_out, name = _text(case)
    before = time.process_time()
    scored = train_and_score(case.tuning, train, case.seed)
    base_s = time.process_time() - before
    run = functools.partial(tune, case.tuning, scored.weights, held_out=held_out, seed=case.seed)
    steps, aum = case.tuning.steps(len(train)), scored.table.score("aum")
    arms = {"whole": run(train=train, steps=steps)}
    mean_aum = {"whole": float(aum.mean())}
    for keep in case.keeps:
        size = coreset_size(len(train), 1 - keep)
        few = case.tuning.steps(size)
        arms[f"{keep:g} whole, few steps"] = run(train=train, steps=few)
        for method in METHODS:
            ids = _method(method, keep, case.beta).select(scored.table, size, case.seed)
            part = subset(train, ids)
            mean_aum[f"{keep:g} {method}"] = float(aum[ids].mean())
            arms[f"{keep:g} {method}"] = run(train=part, steps=steps)
            if method != "hardest":
                arms[f"{keep:g} {method}, few steps"] = run(train=part, steps=few)
    return {
        "seed": case.seed,
        "data": name,
        "base_cpu_s": base_s,
        "recording_cpu_s": scored.recording_s,
        "mean_aum": mean_aum,
        "arms": {arm: dataclasses.asdict(found) for arm, found in arms.items()},
    }


def _method(name: str, keep: float, beta: float | None) -> Method:
    cut = default_beta(1 - keep) if beta is None else beta
    methods: dict[str, Method] = {
        "ccs": CCS(beta=cut), "random": Random(), "hardest": HardestFirst()
    }  # fmt: skip
    return methods[name]


def _gap(row: dict[str, Any], arm: str, other: str) -> float:
    return float(row["arms"][arm]["nll"] - row["arms"][other]["nll"])


def _text(case: Case) -> tuple[TokenBlocks, TokenBlocks, str]:
    """Blocks to train on, drawn without replacement, and held-out blocks of other documents."""
    source, length = text(), case.tuning.model.length
    everything = TokenBlocks.encode(source.train, to_bytes, length)
    if case.blocks > len(everything):
        raise ConfigError("blocks", case.blocks, f"at most {len(everything)} of {source.name}")
    drawn = np.random.default_rng((case.seed, 47)).permutation(len(everything))[: case.blocks]
    held_out = TokenBlocks.encode(source.held_out, to_bytes, length)
    return subset(everything, drawn), held_out, source.name


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    return {
        arm: {
            field: statistics.mean(row["arms"][arm][field] for row in rows)
            for field in ("nll", "sparsity", "steps", "seconds")
        }
        for arm in rows[0]["arms"]
    }
