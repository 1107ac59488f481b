"""Memory of the store: what is mapped, how much of it is used, how fast it is saved."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from raysys.bench import Baseline, Claim, Profile
from raysys.training.fiited import FiitedConfig, FiitedStore, TableSpec, checkpoint
from raysys.training.fiited.metrics import mapped_bytes
from raysys.training.fiited.metrics import statistics as store_statistics


def fragmentation(profile: Profile) -> Claim:
    """1 - live / mapped bytes of the pool after ten turnovers, against a last-in-first-out list."""
    found = {
        policy: _turn_over(policy, profile.pick(100_000, 400_000)) for policy in ("fullest", "lifo")
    }
    return Claim(
        name="fragmentation",
        value=found["fullest"]["fragmentation"],
        unit="share of mapped bytes",
        better="lower",
        baseline=Baseline(name="last freed, first used", value=found["lifo"]["fragmentation"]),
        samples=found,
    )


def mapped_vs_accounted(profile: Profile) -> Claim:
    """Growth of resident memory over what the store says that it maps."""
    rows = profile.pick(200_000, 1_000_000)
    out = np.ones((20_000, 64), np.float32)  # touched before: it is not the store's
    before = _resident()
    config = FiitedConfig(budget_ratio=0.5, admit_after=0, cadence="manual")
    store = FiitedStore(config, (TableSpec(name="t", dim=64, rows=rows),), engine="native")
    for low in range(0, rows, 20_000):
        store.lookup([np.arange(low, low + 20_000)], train=True, out=out)
    grown, told = _resident() - before, mapped_bytes(store)
    return Claim(
        name="mapped_vs_accounted",
        value=grown / told,
        unit="resident / accounted",
        better="lower",
        samples={"resident_bytes": grown, "accounted_bytes": told},
    )


def checkpoint_mb_s(profile: Profile) -> Claim:
    """Saving and loading with checksums, in MB of state per second of wall time."""
    rows = profile.pick(200_000, 1_000_000)
    config = FiitedConfig(budget_ratio=0.0, admit_after=0, cadence="manual")
    spec = (TableSpec(name="t", dim=64, rows=rows),)
    store = FiitedStore(config, spec, engine="native")
    for low in range(0, rows, 20_000):
        store.lookup([np.arange(low, low + 20_000)], train=True)
    saves, loads, pauses, disk = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for index in range(3):
            start = time.perf_counter()
            manifest = checkpoint.save(store, Path(folder) / str(index))
            size = sum(part["bytes"] for part in manifest["parts"]) / 1e6
            saves.append(size / (time.perf_counter() - start))
            disk.append(_disk_mb_s(Path(folder) / "plain", int(size * 1e6)))
            start = time.perf_counter()
            checkpoint.Snapshot(store)
            pauses.append(1e3 * (time.perf_counter() - start))
            fresh = FiitedStore(config, spec, engine="native")
            start = time.perf_counter()
            checkpoint.load(fresh, Path(folder) / str(index))
            loads.append(size / (time.perf_counter() - start))
    return Claim(
        name="checkpoint_mb_s",
        value=statistics.median(saves),
        unit="MB/s",
        better="higher",
        baseline=Baseline(name="plain write and fsync", value=statistics.median(disk)),
        ratio=statistics.median(s / d for s, d in zip(saves, disk)),
        samples={
            "save": saves,
            "load": loads,
            "disk": disk,
            "snapshot_pause_ms": pauses,
            "megabytes": size,
        },
    )


def _turn_over(policy: Any, rows: int) -> dict[str, float]:
    config = FiitedConfig(
        budget_slots=rows, chunk=16, interval=20, gamma=0.5, free_policy=policy, churn_cap=0.5
    )
    store = FiitedStore(config, (TableSpec(name="t", dim=64, rows=rows),), engine="native")
    rng = np.random.default_rng(0)
    turned, shift = 0.0, 0
    while turned < 10 and shift < 4000:
        shift += 1  # the popular ids drift through the id space
        ids = (rng.zipf(1.2, 20_000) % rows) + shift * rows // 40
        _, batch = store.lookup([ids], train=True)
        store.update(batch, rng.standard_normal((len(ids), 64)).astype(np.float32))
        store.end_step()
        turned = store.engine.counters()["evicted"] / store.slots
    found = store_statistics(store)
    return {"fragmentation": found["fragmentation"], "turnovers": turned, "steps": shift}


def _resident() -> int:
    text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    line = next(line for line in text.splitlines() if line.startswith("Rss:"))
    return int(line.split()[1]) * 1024


def _disk_mb_s(path: Path, size: int) -> float:
    """Speed of writing as many plain bytes to the same file system."""
    data = np.random.default_rng(0).integers(0, 255, size, np.uint8)
    start = time.perf_counter()
    with path.open("wb") as file:
        file.write(data.tobytes())
        file.flush()
        os.fsync(file.fileno())
    path_s = time.perf_counter() - start
    path.unlink()
    return size / 1e6 / path_s
