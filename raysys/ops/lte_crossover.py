"""At which density the dense FFN is faster than the sparse one, measured on this machine.

With batch size the dense product gets efficient, so the density at which skipping still pays falls.
Both are timed once per shape, type and number of threads, and kept in the cache folder.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from raysys import machine
from raysys.ops import lte_reference as reference
from raysys.ops.lte_native import ISAS, NativeLayer

_LOG = logging.getLogger(__name__)
BUCKETS = (1, 4, 8, 16, 32, 64, 256)
VERSION = 3  # of the kernel: what was measured for another one does not hold
PATIENCE_S = 2.0  # once a bucket took longer, larger ones take its figure (large layers)
# Before a measurement: what was measured for several shapes on a CPU with AVX-512.
UNMEASURED = {1: 1.0, 4: 1.0, 8: 1.0, 16: 0.95, 32: 0.9, 64: 0.8, 256: 0.7}


@dataclass(slots=True)
class Crossover:
    """Highest density per number of tokens at which the sparse path is taken.

    Args:
        density: by bucket of tokens (rounded up; the last one also stands for more).
        threads: the number of threads that it holds for; 0 before a measurement.
    """

    density: dict[int, float] = field(default_factory=lambda: dict(UNMEASURED))
    threads: int = 0

    def most(self, tokens: int, experts: int, threads: int) -> int:
        """Most active (token, expert) pairs for the sparse path."""
        known = self.density if threads == self.threads else UNMEASURED
        bucket = next((b for b in BUCKETS if tokens <= b), BUCKETS[-1])
        return int(known[bucket] * tokens * experts + 1e-9)


def key_of(layer: NativeLayer, threads: int) -> str:
    """What the crossover depends on."""
    s = layer.struct
    isa = ISAS[layer.isa or 0]
    sizes = f"d{s.d}-f{s.f}-e{s.E}-g{s.gated}"
    return f"v{VERSION}-{isa}-{sizes}-t{s.dtype}-r{s.router_dtype}-n{threads}"


def crossover_of(layer: NativeLayer, cache: Path) -> Crossover:
    """What the cache knows of a layer's shape, or the unmeasured default."""
    threads = torch.get_num_threads()
    known = _read(_file(cache)).get(key_of(layer, threads))
    return Crossover({int(b): v for b, v in known.items()}, threads) if known else Crossover()


def calibrate(layer: NativeLayer, cache: Path, largest: int = BUCKETS[-1]) -> Crossover:
    """Measure a layer's crossover (tens of milliseconds for small layers) and keep it in the
    cache.

    Args:
        largest: batches above it are not timed and take its figure.
    """
    threads = torch.get_num_threads()
    found = crossover_of(layer, cache)
    if found.threads == threads:
        return found
    density: dict[int, float] = {}
    last, took = 1.0, 0.0
    for bucket in BUCKETS:
        if bucket <= largest and took < PATIENCE_S:
            started = time.perf_counter()
            last = measure(layer, bucket, threads)
            took = time.perf_counter() - started
        density[bucket] = last
    _write(_file(cache), key_of(layer, threads), density)
    return Crossover(density, threads)


def measure(layer: NativeLayer, tokens: int, threads: int) -> float:
    """Density at which both paths take the same time for ``tokens`` tokens; 1.0 if sparse
    always wins.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, layer.struct.d, generator=generator).to(layer.w_in.dtype)
    chance = torch.rand(tokens, layer.struct.n, generator=generator)
    every, half = reference.from_mask(chance >= 0.0), reference.from_mask(chance < 0.5)
    clock = time.thread_time if threads == 1 else time.perf_counter
    dense_s, full_s, half_s = _fastest(
        [
            functools.partial(layer.dense, x, *every, threads),
            functools.partial(layer.masked, x, *every, threads),
            functools.partial(layer.masked, x, *half, threads),
        ],
        clock,
    )
    if full_s <= dense_s:
        return 1.0
    slope = max(2.0 * (full_s - half_s), 1e-12)
    return min(1.0, max(0.0, (dense_s - (full_s - slope)) / slope))


def _fastest(
    runs: Sequence[Callable[[], object]], clock: Callable[[], float], repeats: int = 9,
    enough_s: float = 1.0,
) -> list[float]:  # fmt: skip
    """Shortest time of each run, in turns: what else happens only ever makes one longer."""
    best, total = [float("inf")] * len(runs), 0.0
    for turn in range(repeats):
        for index, run in enumerate(runs):
            started = clock()
            run()
            took = clock() - started
            total += took
            if turn > 0:  # the first turn warms up
                best[index] = min(best[index], took)
        if turn > 0 and total > enough_s:
            break
    return best


def _file(cache: Path) -> Path:
    name = hashlib.sha256(machine.cpu_model().encode()).hexdigest()[:12]
    return cache / "lte" / f"crossover-{name}.json"


def _read(path: Path) -> dict[str, dict[str, float]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return {}
    except ValueError:
        _LOG.warning("%s is damaged and is measured again", path)
        return {}
    return dict(found) if isinstance(found, dict) else {}


def _write(path: Path, key: str, density: dict[int, float]) -> None:
    """Add an entry; a cache that cannot be written costs a measurement, not the run."""
    content = _read(path) | {key: {str(bucket): value for bucket, value in density.items()}}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".part")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        os.replace(partial, path)
    except OSError as error:
        _LOG.warning("the crossover of the LTE kernel is not kept: %s", error)
