"""Systems claims of CCS: selection at scale, recorder overhead, coverage, store ingest."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn
from torch.nn import functional

from actors.ccs import Columns, select_parquet
from jobs.bench.ccs.lab import session
from raysys import scratch
from raysys.bench import Baseline, Claim, Profile
from raysys.training.ccs.accumulator import ScoreAccumulator
from raysys.training.ccs.coverage import nearest_distances
from raysys.training.ccs.dynamics import StatBatch
from raysys.training.ccs.recorder import DynamicsRecorder
from raysys.training.ccs.selection import SelectionConfig

PARTITIONS = (8, 1, 2, 7, 64)
ROWS = 10_000_000


def select_10m_rows_s(profile: Profile) -> Claim:
    """Seconds to select 1 M of 10 M Parquet rows, and whether every partitioning agrees."""
    session()
    rng = np.random.default_rng(0)
    with scratch.folder("ccs") as folder:
        path = f"{folder}/scores.parquet"
        columns = {
            "id": rng.permutation(ROWS),
            "aum": rng.normal(size=ROWS),
            "el2n": rng.gamma(2.0, size=ROWS),
        }
        pq.write_table(pa.table(columns), path, row_group_size=ROWS // 64)
        megabytes = Path(path).stat().st_size / 1e6
        del columns
        config, chosen = SelectionConfig(beta=0.1), Columns(score="el2n")
        before = _resident_mib()
        first, seconds, same = None, {}, []
        for partitions in PARTITIONS:
            started = time.monotonic()
            found = select_parquet([path], ROWS // 10, config, chosen, partitions=partitions)
            seconds[partitions] = time.monotonic() - started
            first = found.sample if first is None else first
            same.append(
                bool(np.array_equal(first.ids, found.ids))
                and bool(np.array_equal(first.stratum, found.sample.stratum))
            )
    samples: dict[str, Any] = {
        "seconds_by_partitions": {str(key): value for key, value in seconds.items()},
        "identical": all(same),
        "driver_peak_mib": _peak_mib(),
        "driver_before_mib": before,
        "file_mb": megabytes,
    }
    return Claim(
        name="select_10m_rows_s", value=seconds[8], unit="s", better="lower", samples=samples
    )


class SmallResNet(nn.Module):
    """A small residual network for 32x32 images, the step that recording is compared with."""

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width),
            )
            for _ in range(3)
        )  # fmt: skip
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.stem(x)
        for block in self.blocks:
            hidden = functional.relu(hidden + block(hidden))
        logits: torch.Tensor = self.head(hidden.mean((2, 3)))
        return logits


def recorder_overhead(profile: Profile) -> Claim:
    """CPU time that recording adds to a training step, in percent; each step is split in two."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = SmallResNet()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    rows, batch = 2048, 128
    x, y = torch.randn(rows, 3, 32, 32), torch.randint(0, 10, (rows,))
    store = ScoreAccumulator(np.arange(rows))
    recorder = DynamicsRecorder(store.add)
    step_s, record_s = [], []
    for epoch in range(profile.pick(4, 8)):
        recorder.start_epoch(epoch)
        spent = 0.0
        for start in range(0, rows, batch):
            part = torch.arange(start, start + batch)
            begun = time.process_time()
            logits = net(x[part])
            middle = time.process_time()
            recorder.record(part, logits, y[part])
            after = time.process_time()
            loss = functional.cross_entropy(logits, y[part])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step_s.append(time.process_time() - after + middle - begun)
            spent += after - middle
        begun = time.process_time()
        recorder.flush()
        store.commit(epoch)
        record_s.append((spent + time.process_time() - begun) / (rows // batch))
    step, record = float(np.median(step_s)), float(np.median(record_s))
    return Claim(
        name="recorder_overhead", value=100 * record / step, unit="%", better="lower",
        baseline=Baseline(name="step of a small ResNet, ms", value=1e3 * step),
        ratio=(step + record) / step,
        samples={"record_ms": 1e3 * record, "step_ms": 1e3 * step, "batch": batch},
    )  # fmt: skip


def coverage_50k_5k_512_s(profile: Profile) -> Claim:
    """Seconds for AUC_pr of 5,000 targets against 50,000 kept rows of 512 features."""
    rng = np.random.default_rng(0)
    kept = rng.normal(3.0, 1.0, (50_000, 512)).astype(np.float32)
    targets = rng.normal(3.0, 1.0, (5000, 512)).astype(np.float32)
    started = time.monotonic()
    distances = nearest_distances(kept, targets)
    seconds = time.monotonic() - started
    check = rng.permutation(len(targets))[:8]
    exact = [
        float(np.sqrt(((kept.astype(np.float64) - targets[row]) ** 2).sum(1)).min())
        for row in check
    ]
    error = float(np.abs(distances[check] / exact - 1).max())
    return Claim(
        name="coverage_50k_5k_512_s", value=seconds, unit="s", better="lower",
        samples={"relative_error": error, "auc_pr": float(distances.mean())},
    )  # fmt: skip


def store_ingest_rows_s(profile: Profile) -> Claim:
    """Rows per CPU second that one store shard takes in and applies."""
    rows, batch_rows = profile.pick(1_000_000, 4_000_000), 2048
    rng = np.random.default_rng(0)
    order = rng.permutation(rows)
    batches = [
        _batch(order[start : start + batch_rows], start // batch_rows, rng)
        for start in range(0, rows, batch_rows)
    ]
    store = ScoreAccumulator(np.arange(rows))
    begun = time.process_time()
    for batch in batches:
        store.add(batch)
    store.commit(0)
    seconds = time.process_time() - begun
    return Claim(
        name="store_ingest_rows_s", value=rows / seconds, unit="rows/s", better="higher",
        samples={"rows": rows, "state_bytes_per_row": store.state_bytes / rows},
    )  # fmt: skip


def _batch(ids: np.ndarray, sequence: int, rng: np.random.Generator) -> StatBatch:
    p = rng.random(len(ids), np.float32)
    return StatBatch(0, 0, sequence, ids, ids % 10, 2 * p - 1, p, 1 - p, p > 0.5)


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
