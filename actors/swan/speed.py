"""How fast this device is: one fixed, small piece of training, timed. It feeds Venn's tiers."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

REFERENCE_SCORE = 10.4  # AI-Benchmark's CPU float score of a phone with ...
REFERENCE_MS = 44.0  # ... this latency
MOBILENET_MACS = 300e6
BATCH, REPEATS = 8, 5


def sample_ms() -> float:
    """Milliseconds of training per sample of a small convolutional net, median of five batches."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 10),
        )
        inputs, labels = torch.randn(BATCH, 3, 32, 32), torch.zeros(BATCH, dtype=torch.int64)
    times = []
    for _ in range(REPEATS + 1):
        started_s = time.perf_counter()
        loss = nn.functional.cross_entropy(net(inputs), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        times.append(time.perf_counter() - started_s)
    return 1000.0 * statistics.median(times[1:]) / BATCH


MACS_PER_SAMPLE = 3 * 32 * 32 * 9 * (3 * 16 + 16 * 16)


def cpu_score(milliseconds: float) -> float:
    """A figure on the scale of AI-Benchmark's CPU float score, from :func:`sample_ms`.

    The measured multiply-accumulates per second give the time of a MobileNetV2 forward pass; the
    scale is that of phones whose score and latency are published. Rough, but monotonic.
    """
    rate = MACS_PER_SAMPLE / max(milliseconds * 1e-3, 1e-9)
    latency_ms = 1000.0 * MOBILENET_MACS / rate
    return REFERENCE_SCORE * REFERENCE_MS / latency_ms
