"""Claims about quality: a small language model trained here, LTE and its rivals at equal FLOPs.

With ``--partial FOLDER`` every row is written as soon as it is known, and trainings write their
state every 60 steps: a run that is stopped at any time goes on from there, bit by bit the same.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jobs.bench.lte import models
from jobs.bench.pieces import Piece, measure_pieces
from raysys import machine, scratch
from raysys.bench import Baseline, Claim, Profile
from raysys.config import config_to_dict
from raysys.training.lte.contest import METHODS, REFERENCES, Contest
from raysys.training.lte.contest_config import ContestConfig
from raysys.training.lte.contest_states import States
from raysys.training.lte.text import Corpus, TokenBlocks, corpus, to_bytes

QUICK = ContestConfig(hidden=64, neurons=256, layers=3, heads=2, expert_size=8, length=64,
                      base_steps=250, steps=80, base_lr=3e-3, lr=1e-3, held_out=512)  # fmt: skip
MIDDLE = ContestConfig(hidden=128, neurons=512, layers=4, heads=4, expert_size=16, length=128,
                       base_steps=600, steps=240, base_lr=2e-3, lr=7e-4, stage1=0.2,
                       stage2_rate=1.0, held_out=512)  # fmt: skip
FULL = ContestConfig(hidden=320, neurons=1280, layers=6, heads=5, expert_size=32, length=128,
                     base_steps=600, steps=240, base_lr=1e-3, lr=4e-4, stage1=0.2,
                     stage2_rate=1.0, held_out=256)  # fmt: skip
QUICK_METHODS = ("dense_tuned", "lte", "noisy_top_k", "random_router", "deja_vu", "cats", "teal",
                 "wanda", "keep_largest", "expert_oracle")  # fmt: skip


def text() -> Corpus:
    """Tiny Shakespeare where the optional data are, else Python's own documentation."""
    folder = machine.data_dir()
    if folder is not None and (folder / "tinyshakespeare" / "input.txt").is_file():
        return corpus("shakespeare", folder)
    return corpus("python")


class Study:
    """One configuration of the contest; rows and states of trainings are kept in a folder.

    Args:
        config: sizes and budget.
        partial: folder of :mod:`jobs.bench.pieces`; empty keeps nothing after the process.
    """

    def __init__(self, config: ContestConfig, partial: str = "") -> None:
        self.config, self.partial = config, partial
        source = text()
        self.corpus = source.name
        self.train = TokenBlocks.encode(source.train, to_bytes, config.length)
        self.held_out = TokenBlocks.encode(source.held_out, to_bytes, config.length)
        self.key = {"config": config_to_dict(config), "corpus": source.name}
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:12]
        self.folder = (Path(partial) if partial else scratch.kept("lte")) / f"lte-states-{digest}"
        self._contests: dict[int, Contest] = {}
        self._known: dict[tuple[str, int], dict[str, Any]] = {}

    def rows(self, methods: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
        """Rows of every method and seed.

        What several methods need is trained first, so that several processes on one folder do not
        train it twice. A process that is stopped loses less than the steps between two states.
        """
        self._measure([self._piece("base", {}, self._train_base)])
        needed = ["silu"] + ["relu"] * any(name.startswith("moefication") for name in methods)
        self._measure(
            [
                self._piece(
                    f"tuned-{kind}-{seed}",
                    {"tuned": kind, "seed": seed},
                    functools.partial(self._train_tuned, kind, seed),
                )
                for seed in seeds
                for kind in needed
            ]
        )
        return self._measure(
            [
                self._piece(
                    f"{method}-{seed}",
                    {"method": method, "seed": seed},
                    functools.partial(self.row, method, seed),
                )
                for seed in seeds
                for method in methods
            ]
        )

    def row(self, method: str, seed: int) -> dict[str, Any]:
        """A method's row, measured once per process."""
        if (method, seed) not in self._known:
            row = self.contest(seed).run(method)
            print(f"lte: {method}, seed {seed}: {row['nll']:.4f} nats at {row['sparsity']:.3f}",
                  file=sys.stderr, flush=True)  # fmt: skip
            self._known[method, seed] = row
        return self._known[method, seed]

    def at_sparsities(self, targets: Sequence[float]) -> list[dict[str, Any]]:
        """LTE's rows for several wanted sparsities, seed 0."""

        def row(target: float) -> dict[str, Any]:
            wanted = dataclasses.replace(self.config, sparsity=target)
            contest = Contest(wanted, self.train, self.held_out, self.base(), 0)
            return {"target": target, **contest.run("lte")}

        self._measure([self._piece("base", {}, self._train_base)])
        return self._measure(
            [
                self._piece(
                    f"target-{target:g}", {"target": target}, functools.partial(row, target)
                )
                for target in targets
            ]
        )

    def base(self) -> dict[str, Tensor]:
        """Weights of the dense model from scratch, the start of every method and seed."""
        states = States(self.folder)
        weights: dict[str, Tensor] | None = states.load("base-weights")
        if weights is None:
            weights = Contest.train_base(self.config, self.train, states=states)
            states.save("base-weights", weights)
            states.drop("base")
        return weights

    def contest(self, seed: int) -> Contest:
        """The contest of a seed; one is kept at a time, because each holds tuned models."""
        if seed not in self._contests:
            states = States(self.folder / f"seed-{seed}")
            self._contests = {
                seed: Contest(
                    self.config, self.train, self.held_out, self.base(), seed, states=states
                )
            }
        return self._contests[seed]

    def _piece(self, name: str, key: dict[str, Any], measure: Callable[[], Any]) -> Piece:
        return Piece(f"lte-{name}", {**self.key, **key}, measure)

    def _measure(self, pieces: Sequence[Piece]) -> list[Any]:
        before = models.single_thread()  # the same sums in the same order on every machine
        try:
            return measure_pieces(self.partial, pieces)
        finally:
            torch.set_num_threads(before)

    def _train_base(self) -> dict[str, int]:
        self.base()
        return {"steps": self.config.base_steps}

    def _train_tuned(self, kind: str, seed: int) -> dict[str, int]:
        self.contest(seed).tuned(kind)
        return {"steps": self.config.steps}


@functools.cache
def study(name: str, partial: str = "") -> Study:
    """The study of a size: quick, middle or full."""
    return Study({"quick": QUICK, "middle": MIDDLE, "full": FULL}[name], partial)


def quality_at_flops(profile: Profile) -> Claim:
    """Held-out nats per byte above the dense model tuned equally long, at 62 % FFN sparsity.

    The baseline is the best rival that runs at the same FLOPs; oracles are in the table only.
    In full ten million parameters and three seeds, hours of one core: give ``--partial``.
    """
    size, seeds = profile.pick(("quick", (0,)), ("full", (0, 1, 2)))
    return _quality("quality_at_flops", profile, size, seeds)


def quality_at_flops_middle(profile: Profile) -> Claim:
    """The same with three seeds for a model of a million parameters, in the quick profile of 0.2
    million.
    """
    return _quality("quality_at_flops_middle", profile, profile.pick("quick", "middle"), (0, 1, 2))


def _quality(name: str, profile: Profile, size: str, seeds: tuple[int, ...]) -> Claim:
    found = study(size, profile.partial)
    methods = profile.pick(QUICK_METHODS, tuple(METHODS))
    rows = found.rows(methods, seeds)
    means = {
        method: statistics.mean(row["nll"] for row in rows if row["method"] == method)
        for method in methods
    }
    dense = means["dense_tuned"]
    rivals = {m: v for m, v in means.items() if m not in REFERENCES and m != "lte"}
    best = min(rivals, key=lambda method: rivals[method])
    return Claim(
        name=name,
        value=means["lte"] - dense,
        unit="nats per byte above the dense model tuned equally long",
        better="lower",
        baseline=Baseline(name=f"best rival at the same FLOPs: {best}", value=rivals[best] - dense),
        samples={
            "above_dense_tuned": {method: value - dense for method, value in means.items()},
            "lte_sparsity": [row["sparsity"] for row in rows if row["method"] == "lte"],
            "rows": rows,
            "corpus": found.corpus,
            "config": config_to_dict(found.config),
        },
        seeds=list(seeds),
    )


def target_sparsity_error(profile: Profile) -> Claim:
    """Largest distance of the achieved held-out sparsity to the wanted one, in points."""
    targets = profile.pick((0.5, 0.8), (0.3, 0.5, 0.62, 0.8, 0.9))
    found = study(profile.pick("quick", "middle"), profile.partial)
    rows = found.at_sparsities(targets)
    errors = [100 * abs(row["sparsity"] - row["target"]) for row in rows]
    return Claim(
        name="target_sparsity_error",
        value=max(errors),
        unit="points of FFN sparsity, held-out text, worst target",
        better="lower",
        samples=rows,
        seeds=[0],
    )
