"""Claims about quality: a small language model trained here, LTE and its rivals at equal FLOPs.

Every row is written as soon as it is known and is found again by a later call with the same
configuration, so a long run may be cut into pieces.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from raysys import machine
from raysys.bench import Baseline, Claim, Profile
from raysys.config import config_to_dict
from raysys.training.lte.contest import METHODS, REFERENCES, Contest
from raysys.training.lte.contest_config import ContestConfig
from raysys.training.lte.text import Corpus, TokenBlocks, corpus, to_bytes

QUICK = ContestConfig(hidden=64, neurons=256, layers=3, heads=2, expert_size=8, length=64,
                      base_steps=250, steps=80, base_lr=3e-3, lr=1e-3, held_out=48)  # fmt: skip
MIDDLE = ContestConfig(hidden=128, neurons=512, layers=4, heads=4, expert_size=16, length=128,
                       base_steps=600, steps=240, base_lr=2e-3, lr=7e-4, held_out=64)  # fmt: skip
FULL = ContestConfig(hidden=320, neurons=1280, layers=6, heads=5, expert_size=32, length=128,
                     base_steps=600, steps=240, base_lr=1e-3, lr=4e-4, held_out=48)  # fmt: skip
QUICK_METHODS = ("dense_tuned", "lte", "noisy_top_k", "random_router", "deja_vu", "cats", "teal",
                 "wanda", "keep_largest", "expert_oracle")  # fmt: skip


def text() -> Corpus:
    """Tiny Shakespeare where the optional data are, else Python's own documentation."""
    folder = machine.data_dir()
    if folder is not None and (folder / "tinyshakespeare" / "input.txt").is_file():
        return corpus("shakespeare", folder)
    return corpus("python")


class Study:
    """One configuration of the contest with its rows on disk."""

    def __init__(self, config: ContestConfig) -> None:
        self.config = config
        source = text()
        self.corpus = source.name
        self.train = TokenBlocks.encode(source.train, to_bytes, config.length)
        self.held_out = TokenBlocks.encode(source.held_out, to_bytes, config.length)
        key = json.dumps([config_to_dict(config), source.name], sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()[:12]
        self.folder = machine.cache_dir() / "lte" / f"contest-{digest}"
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.json").write_text(key)
        self._contests: dict[int, Contest] = {}

    def row(self, method: str, seed: int) -> dict[str, Any]:
        """A method's row, from disk or measured now."""
        path = self.folder / f"{method}-{seed}.json"
        if path.is_file():
            return dict(json.loads(path.read_text()))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the same sums in the same order on every machine
        try:
            row = self._contest(seed).run(method)
        finally:
            torch.set_num_threads(threads)
        _write(path, json.dumps(row))
        print(f"lte: {method}, seed {seed}: {row['nll']:.4f} nats at {row['sparsity']:.3f}",
              file=sys.stderr, flush=True)  # fmt: skip
        return row

    def _contest(self, seed: int) -> Contest:
        if seed not in self._contests:
            path = self.folder / "base.pt"
            if not path.is_file():
                base = Contest.train_base(self.config, self.train)
                partial = path.with_suffix(".part")
                torch.save(base, partial)
                partial.rename(path)
            base = torch.load(path, weights_only=True)
            contest = Contest(self.config, self.train, self.held_out, base, seed)
            self._contests = {seed: contest}  # one at a time: each keeps tuned models
        return self._contests[seed]


def _write(path: Path, content: str) -> None:
    partial = path.with_suffix(".part")
    partial.write_text(content)
    partial.rename(path)


@functools.cache
def study(name: str) -> Study:
    """The study of a size: quick, middle or full."""
    return Study({"quick": QUICK, "middle": MIDDLE, "full": FULL}[name])


def quality_at_flops(profile: Profile) -> Claim:
    """Held-out nats per byte above the dense model tuned equally long, at 62 % FFN sparsity.

    The baseline is the best rival that runs at the same FLOPs; oracles are in the table only.
    """
    return _quality("quality_at_flops", profile.pick("quick", "full"), profile.pick((0,), (0, 1,
    2)),                 profile.pick(QUICK_METHODS, tuple(METHODS)))  # fmt: skip


def quality_at_flops_middle(profile: Profile) -> Claim:
    """The same for a model of a million parameters; one seed and fewer rivals in the quick
    profile.
    """
    name = profile.pick("quick", "middle")
    seeds = profile.pick((0,), (0, 1, 2))
    return _quality(
        "quality_at_flops_middle", name, seeds, profile.pick(QUICK_METHODS, tuple(METHODS))
    )


def _quality(name: str, size: str, seeds: tuple[int, ...], methods: tuple[str, ...]) -> Claim:
    found = study(size)
    rows = [found.row(method, seed) for seed in seeds for method in methods]
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
    config = QUICK if not profile.full else MIDDLE
    rows = []
    base = study(profile.pick("quick", "middle"))
    base.row("dense", 0)  # trains the start where it is missing
    start = torch.load(base.folder / "base.pt", weights_only=True)
    for target in targets:
        wanted = dataclasses.replace(config, sparsity=target)
        contest = Contest(wanted, base.train, base.held_out, start, 0)
        rows.append({"target": target, **contest.run("lte")})
    errors = [100 * abs(row["sparsity"] - row["target"]) for row in rows]
    return Claim(
        name="target_sparsity_error",
        value=max(errors),
        unit="points of FFN sparsity, held-out text, worst target",
        better="lower",
        samples=rows,
        seeds=[0],
    )
