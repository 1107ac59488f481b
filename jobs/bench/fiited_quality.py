"""Quality on the planted stream and on MovieLens: how much AUC a smaller table costs."""

from __future__ import annotations

import functools
import statistics
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from raysys.bench import Baseline, Claim, Profile
from raysys.training.fiited import FiitedConfig
from raysys.training.fiited.baselines import Embedding, build
from raysys.training.fiited.models import DLRM
from raysys.training.fiited.progressive import Record, run
from raysys.training.fiited.stream import ClickBatch, PlantedStream, StreamConfig

DIM = 16
BASE = FiitedConfig(chunk=4, budget_ratio=0.5, interval=20, lr=0.05)
SIGNALS = {"weak": 1.0, "strong": 2.0}
LATE = (0.85, 1.0)


def stream_config(profile: Profile, signal: str, seed: int) -> StreamConfig:
    """The reference stream, or a quarter of it in the quick profile."""
    small = StreamConfig(signal=SIGNALS[signal], seed=seed)
    if profile.full:
        return small
    rows = tuple(max(20, n // 4) for n in small.rows)
    return replace(small, rows=rows, batch=1024, steps=400, swap_at=200)


@functools.cache
def trained(
    profile: Profile, signal: str, seed: int, method: str, ratio: float, utility: str, gamma: float
) -> tuple[Record, Embedding, PlantedStream]:
    """One method trained over the stream; the same dense net and seed for every method."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    config = stream_config(profile, signal, seed)
    settings = replace(BASE, seed=seed, utility=utility, gamma=gamma)
    embedding = build(method, config.rows, DIM, ratio, settings)
    stream = PlantedStream(config)
    return run(stream, embedding, DLRM(len(config.rows), embedding.width)), embedding, stream


def late_auc(profile: Profile, signal: str, seed: int, method: str, ratio: float = 0.0) -> float:
    """AUC over the last 15% of the stream."""
    record, _, _ = trained(profile, signal, seed, method, ratio, "freq_grad", 0.9)
    return record.auc(*LATE)


def auc_loss(name: str, ratio: float, profile: Profile) -> Claim:
    """AUC lost against full width; the larger of both streams, with both in the samples."""
    seeds = list(range(profile.pick(1, 3)))
    samples: dict[str, Any] = {}
    losses = {}
    for signal in SIGNALS:
        full = [late_auc(profile, signal, seed, "full") for seed in seeds]
        ours = [late_auc(profile, signal, seed, "chunks", ratio) for seed in seeds]
        losses[signal] = statistics.mean(f - o for f, o in zip(full, ours))
        samples[signal] = {"full": full, "chunks": ours, "loss": losses[signal]}
        record, *_ = trained(profile, signal, seeds[0], "full", 0.0, "freq_grad", 0.9)
        samples[signal]["bayes"] = record.bayes_auc(*LATE)
    return Claim(
        name=name,
        value=max(losses.values()),
        unit="AUC",
        better="lower",
        baseline=Baseline(name="full width", value=0.0),
        samples=samples,
        seeds=seeds,
    )


def chunks_vs_rows(profile: Profile) -> Claim:
    """Smallest lead of chunks over whole-row pruning over the budgets; other methods in samples."""
    seeds = list(range(profile.pick(1, 3)))
    ratios = profile.pick((0.9,), (0.75, 0.9, 0.95, 0.98))
    samples: dict[str, Any] = {}
    leads = []
    for ratio in ratios:
        found = {
            method: [late_auc(profile, "weak", seed, method, ratio) for seed in seeds]
            for method in (
                "chunks",
                "rows",
                "frequency",
                "hashing",
                "quotient_remainder",
                "uniform",
            )
        }
        leads.append(statistics.mean(found["chunks"]) - statistics.mean(found["rows"]))
        samples[str(ratio)] = found
    return Claim(
        name="chunks_vs_rows",
        value=min(leads),
        unit="AUC",
        better="higher",
        baseline=Baseline(name="whole-row pruning", value=0.0),
        samples=samples,
        seeds=seeds,
    )


def bytes_saved_90(profile: Profile) -> Claim:
    """Resident bytes saved at 90% of chunks pruned, index and sketch included."""
    _, ours, _ = trained(profile, "weak", 0, "chunks", 0.9, "freq_grad", 0.9)
    _, full, _ = trained(profile, "weak", 0, "full", 0.0, "freq_grad", 0.9)
    stats = ours.bag(0).stats()
    samples = {
        "rho": stats["rho"],
        "rho_bytes": stats["rho_bytes"],
        "bytes": ours.bytes(),
        "full_bytes": full.bytes(),
    }
    parts = ("pool_mapped", "directory_bytes", "sketch_bytes", "scratch_bytes")
    return Claim(
        name="bytes_saved_90",
        value=1 - ours.bytes() / full.bytes(),
        unit="share of full-width bytes",
        better="higher",
        baseline=Baseline(name="chunk ratio, without index", value=0.9),
        samples=samples | {part: stats[part] for part in parts},
        seeds=[0],
    )


def post_drift_recovery(profile: Profile) -> Claim:
    """AUC in the tenth after the swap: forgetting (gamma 0.9) against never forgetting (1.0)."""
    seeds = list(range(profile.pick(1, 3)))
    found = {
        gamma: [
            trained(profile, "weak", s, "chunks", 0.95, "freq_grad", gamma)[0].auc(0.5, 0.6)
            for s in seeds
        ]
        for gamma in (0.9, 1.0)
    }
    return Claim(
        name="post_drift_recovery",
        value=statistics.mean(found[0.9]),
        unit="AUC",
        better="higher",
        baseline=Baseline(name="gamma 1, never forgets", value=statistics.mean(found[1.0])),
        ratio=statistics.mean(found[0.9]) / statistics.mean(found[1.0]),
        samples={str(gamma): values for gamma, values in found.items()},
        seeds=seeds,
    )


def importance_found(profile: Profile) -> Claim:
    """Value of the ids that own memory over the value that an oracle keeps in as many rows."""
    shares = {
        utility: _value_kept(*trained(profile, "strong", 0, method, 0.95, used, 0.9)[1:])
        for utility, (method, used) in {
            "saliency": ("chunks", "saliency"),
            "freq_grad": ("chunks", "freq_grad"),
            "frequency": ("frequency", "freq_grad"),
        }.items()
    }
    return Claim(
        name="importance_found",
        value=shares["saliency"],
        unit="share of the oracle's value",
        better="higher",
        baseline=Baseline(name="frequency only", value=shares["frequency"]),
        ratio=shares["saliency"] / shares["frequency"],
        samples=shares,
        seeds=[0],
    )


def _value_kept(embedding: Embedding, stream: PlantedStream) -> float:
    values, kept = [], []
    store = embedding.bag(0).store
    for index, table in enumerate(store.tables):
        values.append(stream.values(index, 100_000))
        kept.append(store.dims(table.name, np.arange(table.rows)) > 0)
    value, resident = np.concatenate(values), np.concatenate(kept)
    best = np.sort(value)[::-1][: int(resident.sum())]
    return float(value[resident].sum() / best.sum())


def movielens(profile: Profile) -> Claim:
    """AUC on MovieLens latest small at 90% pruned against whole rows; the rest in samples."""
    from raysys.training.fiited.movielens import fields, load, split_stream

    data = load()
    seeds = list(range(profile.pick(1, 3)))
    cases = [("full", 0.0), ("chunks", 0.9), ("rows", 0.9)]
    if profile.full:
        cases += [("chunks", r) for r in (0.75, 0.95)] + [("rows", 0.95)]
        cases += [("hashing", r) for r in (0.75, 0.9)]
    found: dict[str, list[float]] = {}
    for method, ratio in cases:
        for seed in seeds:
            torch.manual_seed(seed)
            embedding = build(method, fields(data), DIM, ratio, replace(BASE, seed=seed))
            batches: list[ClickBatch] = split_stream(data, seed, passes=2, batch=512)
            model = DLRM(len(fields(data)), embedding.width)
            record = run(batches, embedding, model)
            held = len(batches) - -(-len(data.labels) // 10 // 512)
            found.setdefault(f"{method} {ratio:g}", []).append(record.auc(held / len(batches)))
    return Claim(
        name="movielens",
        value=statistics.mean(found["chunks 0.9"]),
        unit="AUC",
        better="higher",
        baseline=Baseline(name="whole rows, 90%", value=statistics.mean(found["rows 0.9"])),
        ratio=statistics.mean(found["chunks 0.9"]) / statistics.mean(found["rows 0.9"]),
        samples=found,
        seeds=seeds,
    )
