"""Quality on the planted stream and on MovieLens: how much AUC a smaller table costs."""

from __future__ import annotations

import functools
import itertools
import statistics
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from jobs.bench.pieces import Piece, measure_pieces
from raysys.bench import Baseline, Claim, Profile
from raysys.training.fiited import FiitedConfig
from raysys.training.fiited.baselines import Embedding, build
from raysys.training.fiited.metrics import statistics as store_statistics
from raysys.training.fiited.models import DLRM
from raysys.training.fiited.progressive import Record, run
from raysys.training.fiited.stream import PlantedStream, StreamConfig

DIM = 16
BASE = FiitedConfig(chunk=4, budget_ratio=0.5, interval=20, lr=0.05)
SIGNALS = {"weak": 1.0, "strong": 2.0}
LATE = (0.85, 1.0)
LATE_GAMMA = 0.95  # chosen on seeds 7 and 8 for the AUC late in the stream; no claim counts them
WINDOWS = 20
BUDGETS = (0.75, 0.9, 0.95, 0.98)
BANDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # upper ends, as shares of a field's ids
RIVALS = ("rows", "frequency", "hashing", "quotient_remainder", "uniform")


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One method trained over one stream; everything that its result depends on."""

    signal: str
    seed: int
    method: str = "chunks"
    ratio: float = 0.0
    utility: str = "freq_grad"
    gamma: float = 0.9
    weights: Literal["fp32", "bf16"] = "fp32"
    full_stream: bool = False

    def stream(self) -> StreamConfig:
        """The reference stream, or a quarter of it."""
        config = StreamConfig(signal=SIGNALS[self.signal], seed=self.seed)
        if self.full_stream:
            return config
        rows = tuple(max(20, n // 4) for n in config.rows)
        return replace(config, rows=rows, batch=1024, steps=400, swap_at=200)

    def measure(self) -> dict[str, Any]:
        """Train predict-then-train; AUC by part of the stream, bytes, and value kept."""
        torch.set_num_threads(1)
        torch.manual_seed(self.seed)
        config = self.stream()
        settings = replace(
            BASE, seed=self.seed, utility=self.utility, gamma=self.gamma, weights=self.weights
        )
        embedding = build(self.method, config.rows, DIM, self.ratio, settings)
        stream = PlantedStream(config)
        record = run(stream, embedding, DLRM(len(config.rows), embedding.width))
        return _summary(record, embedding, stream)


def _summary(record: Record, embedding: Embedding, stream: PlantedStream) -> dict[str, Any]:
    store = embedding.bag(0).store
    found: dict[str, Any] = {
        "late": record.auc(*LATE),
        "before_drift": record.auc(0.4, 0.5),
        "after_drift": record.auc(0.5, 0.6),
        "bayes": record.bayes_auc(*LATE),
        "log_loss": record.log_loss(*LATE),
        "curve": [record.auc(i / WINDOWS, (i + 1) / WINDOWS) for i in range(WINDOWS)],
        "bytes": embedding.bytes(),
    }
    if not store.dense:
        stats = store_statistics(store)
        names = ("rho", "rho_bytes", "pool_mapped", "pool_live", "directory_bytes", "sketch_bytes")
        found |= {name: stats[name] for name in (*names, "scratch_bytes", "rows_seen", "rows")}
        found["value_kept"] = _value_kept(embedding, stream)
        found["lengths_by_popularity"] = _lengths_by_popularity(embedding, stream)
    return found


def trained(profile: Profile, runs: list[Run]) -> list[dict[str, Any]]:
    """Results of runs, each kept as a piece where ``--partial`` names a folder."""
    done = _KNOWN.setdefault(profile.partial, {})
    fresh = [r for r in dict.fromkeys(runs) if r not in done]
    pieces = [Piece(f"fiited-{r.signal}-{r.method}", asdict(r), r.measure) for r in fresh]
    done.update(zip(fresh, measure_pieces(profile.partial, pieces)))
    return [done[r] for r in runs]


_KNOWN: dict[str, dict[Run, dict[str, Any]]] = {}


def seeds_of(profile: Profile) -> list[int]:
    return list(range(profile.pick(1, 3)))


def auc_loss(name: str, ratio: float, profile: Profile) -> Claim:
    """AUC lost against full width; the larger of both streams, with both in the samples."""
    seeds = seeds_of(profile)
    samples: dict[str, Any] = {}
    losses = {}
    for signal in SIGNALS:
        ours = _runs(profile, signal, "chunks", ratio, gamma=LATE_GAMMA)
        full = _runs(profile, signal, "full", 0.0)
        differences = [f["late"] - o["late"] for f, o in zip(full, ours)]
        losses[signal] = statistics.mean(differences)
        samples[signal] = {
            "full": [f["late"] for f in full],
            "chunks": [o["late"] for o in ours],
            "losses": differences,
            "loss": losses[signal],
            "bayes": full[0]["bayes"],
        }
    return Claim(
        name=name,
        value=max(losses.values()),
        unit="AUC",
        better="lower",
        baseline=Baseline(name="full width", value=0.0),
        samples=samples,
        seeds=seeds,
    )


def bf16_auc_loss(profile: Profile) -> Claim:
    """AUC lost by bfloat16 weights against fp32 ones, as many chunks each: the largest of two
    streams and two budgets; the samples have the pool's bytes."""
    samples: dict[str, Any] = {}
    losses = []
    for signal, ratio in itertools.product(SIGNALS, (0.75, 0.9)):
        wide = _runs(profile, signal, "chunks", ratio)
        half = _runs(profile, signal, "chunks", ratio, weights="bf16")
        differences = [w["late"] - h["late"] for w, h in zip(wide, half)]
        losses.append(statistics.mean(differences))
        samples[f"{signal} {ratio:g}"] = {
            "fp32": [w["late"] for w in wide],
            "bf16": [h["late"] for h in half],
            "losses": differences,
            **{
                f"{part} {name}": some[0][part]
                for name, some in (("fp32", wide), ("bf16", half))
                for part in ("bytes", "pool_live")
            },
        }
    return Claim(
        name="bf16_auc_loss",
        value=max(losses),
        unit="AUC",
        better="lower",
        baseline=Baseline(name="fp32 weights", value=0.0),
        samples=samples,
        seeds=seeds_of(profile),
    )


def chunks_vs_rows(profile: Profile) -> Claim:
    """Smallest lead of chunks over whole-row pruning over the budgets; other methods in samples."""
    seeds = seeds_of(profile)
    samples: dict[str, Any] = {}
    leads = []
    for ratio in profile.pick((0.75, 0.9, 0.95), BUDGETS):
        found = {}
        for method in ("chunks", *RIVALS):
            results = _runs(profile, "weak", method, ratio)
            found[method] = {
                "late": [r["late"] for r in results],
                "bytes": results[0]["bytes"],
            }
        gaps = [a - b for a, b in zip(found["chunks"]["late"], found["rows"]["late"])]
        leads.append(statistics.mean(gaps))
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
    ours = _runs(profile, "weak", "chunks", 0.9)[0]
    full = _runs(profile, "weak", "full", 0.0)[0]
    parts = ("rho", "rho_bytes", "bytes", "pool_mapped", "directory_bytes", "sketch_bytes")
    return Claim(
        name="bytes_saved_90",
        value=1 - ours["bytes"] / full["bytes"],
        unit="share of full-width bytes",
        better="higher",
        baseline=Baseline(name="chunk ratio, without index", value=0.9),
        samples={part: ours[part] for part in parts} | {"full_bytes": full["bytes"]},
        seeds=[0],
    )


def post_drift_recovery(profile: Profile) -> Claim:
    """AUC in the tenth after the swap: forgetting (gamma 0.9) against never forgetting (1.0).

    The samples have the steps until 90% of the AUC that the swap cost is regained.
    """
    seeds = seeds_of(profile)
    found, steps = {}, {}
    for gamma in (0.9, 1.0):
        results = _runs(profile, "weak", "chunks", 0.95, gamma=gamma)
        found[gamma] = [r["after_drift"] for r in results]
        steps[str(gamma)] = [_recovery(r["curve"]) for r in results]
    return Claim(
        name="post_drift_recovery",
        value=statistics.mean(found[0.9]),
        unit="AUC",
        better="higher",
        baseline=Baseline(name="gamma 1, never forgets", value=statistics.mean(found[1.0])),
        ratio=statistics.mean(found[0.9]) / statistics.mean(found[1.0]),
        samples={"auc": {str(g): v for g, v in found.items()}, "share_of_stream": steps},
        seeds=seeds,
    )


def importance_found(profile: Profile) -> Claim:
    """Value of the ids that own memory over the value that an oracle keeps in as many rows."""
    shares = {}
    for name, (method, utility) in {
        "saliency": ("chunks", "saliency"),
        "freq_grad": ("chunks", "freq_grad"),
        "frequency": ("frequency", "freq_grad"),
    }.items():
        results = _runs(profile, "strong", method, 0.95, utility=utility)
        shares[name] = [r["value_kept"] for r in results]
    means = {name: statistics.mean(values) for name, values in shares.items()}
    return Claim(
        name="importance_found",
        value=means["saliency"],
        unit="share of the oracle's value",
        better="higher",
        baseline=Baseline(name="frequency only", value=means["frequency"]),
        ratio=means["saliency"] / means["frequency"],
        samples=shares,
        seeds=seeds_of(profile),
    )


def movielens(profile: Profile) -> Claim:
    """AUC on MovieLens latest small at 90% pruned against whole rows; the rest in samples."""
    from raysys.training.fiited.movielens import load

    load()  # says at once when the data set is not there
    seeds = seeds_of(profile)
    cases = [("full", 0.0), ("chunks", 0.9), ("rows", 0.9)]
    if profile.full:
        cases += [("chunks", 0.75), ("chunks", 0.95), ("rows", 0.75), ("rows", 0.95)]
        cases += [("hashing", ratio) for ratio in (0.75, 0.9, 0.95)] + [("uniform", 0.75)]
    pieces = [
        Piece(
            f"fiited-movielens-{method}",
            {"method": method, "ratio": ratio, "seed": seed, "found": "auc, bytes"},
            functools.partial(_movielens_run, method, ratio, seed),
        )
        for method, ratio in cases
        for seed in seeds
    ]
    values = iter(measure_pieces(profile.partial, pieces))
    found = {f"{method} {ratio:g}": [next(values)["auc"] for _ in seeds] for method, ratio in cases}
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


def _movielens_run(method: str, ratio: float, seed: int) -> dict[str, float]:
    from raysys.training.fiited.movielens import fields, load, split_stream

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    data = load()
    embedding = build(method, fields(data), DIM, ratio, replace(BASE, seed=seed))
    batches = split_stream(data, seed, passes=2, batch=512)
    record = run(batches, embedding, DLRM(len(fields(data)), embedding.width))
    held = len(batches) - -(-len(data.labels) // 10 // 512)
    return {"auc": record.auc(held / len(batches)), "bytes": float(embedding.bytes())}


def _runs(
    profile: Profile, signal: str, method: str, ratio: float, **fields: Any
) -> list[dict[str, Any]]:
    given = {"signal": signal, "method": method, "ratio": ratio, "full_stream": profile.full}
    return trained(profile, [Run(**{**given, **fields}, seed=s) for s in seeds_of(profile)])


def _recovery(curve: list[float]) -> float:
    """Share of the stream after the swap until 90% of the AUC that it cost is back."""
    half = len(curve) // 2
    before, low = statistics.mean(curve[half - 2 : half]), min(curve[half:])
    wanted = low + 0.9 * (before - low)
    after = curve[half:]
    first = next((i for i, auc in enumerate(after) if auc >= wanted), len(after))
    return first / len(curve)


def _value_kept(embedding: Embedding, stream: PlantedStream) -> float:
    values, kept = [], []
    store = embedding.bag(0).store
    for index, table in enumerate(store.tables):
        values.append(stream.values(index, 100_000))
        kept.append(store.dims(table.name, np.arange(table.rows)) > 0)
    value, resident = np.concatenate(values), np.concatenate(kept)
    best = np.sort(value)[::-1][: int(resident.sum())]
    return float(value[resident].sum() / best.sum())


def _lengths_by_popularity(embedding: Embedding, stream: PlantedStream) -> list[list[int]]:
    """Ids [bands, k + 1] by row length in chunks, per band of popularity within their field."""
    store = embedding.bag(0).store
    k = max(table.dim for table in store.tables) // store.config.chunk
    counts = np.zeros((len(BANDS), k + 1), np.int64)
    for index, table in enumerate(store.tables):
        order = np.argsort(-stream.popularity(index), kind="stable")
        lengths = store.dims(table.name, order) // store.config.chunk
        edges = [round(share * len(order)) for share in (0.0, *BANDS)]
        for band, (low, high) in enumerate(itertools.pairwise(edges)):
            counts[band] += np.bincount(lengths[low:high], minlength=k + 1)
    return [[int(n) for n in row] for row in counts]
