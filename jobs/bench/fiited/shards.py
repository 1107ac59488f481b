"""Shards: bytes on the wire, equality of shard counts, and growth of the id space."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from raysys.bench import Baseline, Claim, Profile
from raysys.training.fiited import FiitedConfig, FiitedEmbeddingBag, TableSpec
from raysys.training.fiited.metrics import mapped_bytes
from raysys.training.fiited.sharding import (
    BucketMap,
    LocalTransport,
    ShardConfig,
    ShardCore,
    ShardedEmbedding,
)
from raysys.training.fiited.sharding.messages import Wire

TABLES, DIM, CHUNK, RATIO, BATCH = 8, 64, 16, 0.9325, 4096


def wire_bytes_93(profile: Profile) -> Claim:
    """Bytes per step between a trainer and two shards at 93.25% pruned, over full width in fp32.

    The same messages with every chunk alive are the full width; bf16 is in the samples.
    """
    rows = profile.pick(20_000, 500_000)
    shares = {wire: _wire_share(rows, wire, profile.pick(60, 150)) for wire in ("fp32", "bf16")}
    return Claim(
        name="wire_bytes_93",
        value=shares["fp32"]["share"],
        unit="share of full-width fp32 bytes",
        better="lower",
        baseline=Baseline(name="full width, fp32", value=1.0),
        ratio=shares["fp32"]["share"],
        samples=shares,
        seeds=[0],
    )


def two_shards_equal_one(profile: Profile) -> Claim:
    """Largest difference in outputs and states between 1, 2 and 3 shards (interval cadence)."""
    steps = profile.pick(25, 120)
    results = [_outputs(shards, steps) for shards in (1, 2, 3)]
    one = results[0]
    worst = 0.0
    for other in results[1:]:
        pairs = zip(one["outputs"], other["outputs"])
        worst = max(worst, *(float(np.abs(a - b).max()) for a, b in pairs))
    same = all(other["rows"] == one["rows"] for other in results[1:])
    return Claim(
        name="two_shards_equal_one",
        value=worst,
        unit="largest absolute difference",
        better="lower",
        baseline=Baseline(name="one shard", value=0.0),
        samples={"states_equal": same, "steps": steps, "evicted": one["evicted"]},
        seeds=[0],
    )


def scale(profile: Profile) -> Claim:
    """Steps per second and mapped bytes as a table grows to 100 million virtual rows.

    The budget grows with the table (93.25% pruned). The value is the slowdown from the smallest to
    the largest table; the samples compare mapped bytes with the memory model at each size.
    """
    sizes = profile.pick((10**6, 10**7), (10**6, 10**7, 10**8))
    found = {f"{rows:,}": _grown(rows, profile.pick(40, 150)) for rows in sizes}
    rates = [f["steps_per_cpu_s"] for f in found.values()]
    return Claim(
        name="scale",
        value=rates[-1] / rates[0],
        unit="steps per CPU second, largest over smallest table",
        better="higher",
        baseline=Baseline(name="1 million rows, steps per CPU second", value=rates[0]),
        ratio=rates[-1] / rates[0],
        samples=found,
        seeds=[0],
    )


def zipf(rng: np.random.Generator, rows: int, size: int, exponent: float = 1.05) -> Any:
    """Ids with Zipf popularity, scattered over the id space by a bijection of the ranks."""
    top = rows ** (1 - exponent) - 1
    ranks = np.floor((top * rng.random(size) + 1) ** (1 / (1 - exponent))).astype(np.int64)
    return (np.minimum(ranks, rows) * 2_654_435_761) % (rows + (rows % 2 == 0))


def _group(
    config: FiitedConfig, tables: tuple[TableSpec, ...], shards: int, wire: Wire
) -> tuple[list[ShardCore], ShardedEmbedding]:
    buckets = BucketMap.even(shards)
    one = ShardConfig(index=0, shards=shards, wire=wire)
    cores = [
        ShardCore(config, tables, replace(one, index=i), buckets.owned(i)) for i in range(shards)
    ]
    layer = ShardedEmbedding(config, tables, buckets, LocalTransport(cores), wire=wire)
    return cores, layer.train()


def _wire_share(rows: int, wire: Wire, steps: int) -> dict[str, float]:
    tables = tuple(TableSpec(name=f"t{i}", dim=DIM, rows=rows) for i in range(TABLES))
    config = FiitedConfig(chunk=CHUNK, budget_ratio=RATIO, interval=20)
    _, layer = _group(config, tables, 2, wire)
    rng = np.random.default_rng(0)
    grad = torch.from_numpy(rng.standard_normal((BATCH, TABLES * DIM)).astype(np.float32) * 0.01)
    full = sent = requests = 0
    for step in range(steps):
        ids = np.stack([zipf(rng, rows, BATCH) for _ in tables], 1)
        before = sum(layer.wire_bytes.values())
        layer(torch.from_numpy(ids)).backward(grad)
        if step < steps - 10:
            continue
        last = layer.log[-1]
        n = sum(len(r.keys) for r in last)
        requests += n
        sent += sum(layer.wire_bytes.values()) - before
        pushed = sum(len(r.push.counts) for r in last if r.push is not None)
        # keys and tables out, lengths and values in; lengths, counts and gradients out
        full += n * (8 + 2 + 1 + DIM * 4) + pushed * (1 + 4 + DIM * 4)
    return {"share": sent / full, "bytes_per_step": sent / 10, "rows_per_step": requests / 10}


def _outputs(shards: int, steps: int) -> dict[str, Any]:
    tables = tuple(TableSpec(name=f"t{i}", dim=16, rows=4000) for i in range(4))
    config = FiitedConfig(chunk=4, budget_ratio=0.9, cadence="interval", interval=10)
    cores, layer = _group(config, tables, shards, "fp32")
    rng = np.random.default_rng(0)
    outputs = []
    for _ in range(steps):
        ids = np.stack([zipf(rng, 4000, 512) for _ in tables], 1)
        out = layer(torch.from_numpy(ids))
        out.backward(torch.cos(torch.arange(out.numel())).reshape(out.shape))
        outputs.append(out.detach().numpy())
    layer.finish()
    rows = {}
    for core in cores:
        entries, utils, values = core.store.engine.export()
        lengths = np.bitwise_count(entries["alive"]).astype(int) * 4
        for entry, util, piece in zip(entries, utils, np.split(values, np.cumsum(lengths)[:-1])):
            key = (int(entry["key"]), int(entry["table"]))
            rows[key] = (piece.tobytes(), util.tobytes(), float(entry["acc"]))
    evicted = sum(core.store.engine.counters()["evicted"] for core in cores)
    return {"outputs": outputs, "rows": rows, "evicted": evicted}


def _grown(rows: int, steps: int) -> dict[str, float]:
    table = TableSpec(name="t", dim=DIM, rows=rows)
    bag = FiitedEmbeddingBag([table], FiitedConfig(budget_ratio=RATIO), engine="native")
    rng = np.random.default_rng(0)
    size = TABLES * BATCH
    grad = torch.from_numpy(rng.standard_normal((size, DIM)).astype(np.float32) * 0.01)
    times = []
    for _ in range(steps):
        ids = torch.from_numpy(zipf(rng, rows, size))
        start = time.process_time()
        bag(ids).backward(grad)
        bag.end_step()
        times.append(time.process_time() - start)
    counters = bag.store.engine.counters()
    model = _model_bytes(counters, DIM // CHUNK)
    mapped = mapped_bytes(bag.store)
    return {
        "steps_per_cpu_s": 1 / float(np.median(times[steps // 2 :])),
        "resident_rows": counters["rows"],
        "alive_chunks": counters["alive"],
        "mapped_bytes": mapped,
        "model_bytes": model,
        "mapped_over_model": mapped / model,
        "full_width_bytes": rows * (DIM * 4 + 4),
    }


def _model_bytes(counters: dict[str, float], k: int) -> float:
    """Memory model of the docs: entries at 60% load, chunks at 95%, the sketch, the scratch."""
    index = counters["rows"] * (32 + 4 * k + 1) / 0.6
    chunks = counters["alive"] * CHUNK * 4 / 0.95
    return index + chunks + counters["sketch_bytes"] + counters["scratch_bytes"]
