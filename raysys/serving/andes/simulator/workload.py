"""Workloads for the simulator: arrivals, lengths and readers, or a recorded trace.

Arrival patterns follow the Andes evaluation (arXiv 2404.16283): Poisson, cyclic bursts (burst
first: rate ``R * intensity`` for ``width`` of the cycle, then what keeps the mean at R), and random
bursts as seen in production logs. Lengths are log-normal with the medians of ShareGPT.

Shapes: R requests.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from raysys.errors import ConfigError, DataError, StorageError
from raysys.serving.andes.snapshot import FloatArray, IntArray
from raysys.serving.andes.spec import READING_CLASSES, QoESpec

Generator = np.random.Generator


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Requests in order of arrival; every array has shape (R,).

    Args:
        name: for reports.
        arrival_s: submission times, non-decreasing.
        prompt_tokens, output_tokens: lengths, at least 1; outputs are forced.
        ttft_s, tau_s, weight: the readers' targets.
        prefix_ids: per request the ids of its prompt's leading blocks (Mooncake traces), or empty.
        prefix_block_tokens: size of those blocks.
    """

    name: str
    arrival_s: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    ttft_s: FloatArray
    tau_s: FloatArray
    weight: FloatArray
    prefix_ids: tuple[tuple[int, ...], ...] = ()
    prefix_block_tokens: int = 512

    @property
    def size(self) -> int:
        return int(self.arrival_s.size)

    @property
    def output_total(self) -> int:
        return int(self.output_tokens.sum())

    def spec(self, index: int) -> QoESpec:
        """The targets of one request."""
        return QoESpec(
            ttft_s=float(self.ttft_s[index]),
            tds=1.0 / float(self.tau_s[index]),
            weight=float(self.weight[index]),
        )

    def thinned(self, share: float, seed: int) -> Workload:
        """Keep each request with probability ``share``; arrival times stay as they are."""
        keep = np.random.default_rng(seed).random(self.size) < share
        return self._select(np.flatnonzero(keep), f"{self.name} x{share:g}")

    def first(self, seconds: float) -> Workload:
        """The requests that arrive within the first ``seconds``."""
        return self._select(np.flatnonzero(self.arrival_s <= seconds), self.name)

    def scaled(self, pace: float) -> Workload:
        """Arrival times and reader targets ``pace`` times as long, for a slower machine."""
        return replace(
            self,
            arrival_s=self.arrival_s * pace,
            ttft_s=self.ttft_s * pace,
            tau_s=self.tau_s * pace,
        )

    def _select(self, index: IntArray, name: str) -> Workload:
        prefixes = tuple(self.prefix_ids[i] for i in index) if self.prefix_ids else ()
        return Workload(
            name=name,
            arrival_s=self.arrival_s[index],
            prompt_tokens=self.prompt_tokens[index],
            output_tokens=self.output_tokens[index],
            ttft_s=self.ttft_s[index],
            tau_s=self.tau_s[index],
            weight=self.weight[index],
            prefix_ids=prefixes,
            prefix_block_tokens=self.prefix_block_tokens,
        )


def readers(rng: Generator, count: int) -> FloatArray:
    """(count,) seconds per token, drawn from the paper's reading classes."""
    shares = np.array([row.share for row in READING_CLASSES])
    tau = np.array([row.tau_s for row in READING_CLASSES])
    picked: FloatArray = tau[rng.choice(tau.size, size=count, p=shares / shares.sum())]
    return picked


def sharegpt_lengths(rng: Generator, count: int) -> tuple[IntArray, IntArray]:
    """Prompt ~ lognormal(ln 160, 1) and output ~ lognormal(ln 250, 0.8), capped at 4,000, 1,500."""
    prompt = np.clip(rng.lognormal(np.log(160.0), 1.0, count), 4, 4000).astype(np.int64)
    output = np.clip(rng.lognormal(np.log(250.0), 0.8, count), 1, 1500).astype(np.int64)
    return prompt, output


def chat_workload(name: str, arrival_s: FloatArray, rng: Generator) -> Workload:
    """Give arrivals ShareGPT-like lengths and reading-class targets."""
    prompt, output = sharegpt_lengths(rng, arrival_s.size)
    return workload_of(name, arrival_s, prompt, output, readers(rng, arrival_s.size))


def workload_of(
    name: str,
    arrival_s: FloatArray,
    prompt_tokens: IntArray,
    output_tokens: IntArray,
    tau_s: FloatArray,
    **extra: Any,
) -> Workload:
    """Assemble a workload with the default TTFT target ``max(1, prompt / 5000)``."""
    return Workload(
        name=name,
        arrival_s=arrival_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        ttft_s=np.maximum(1.0, prompt_tokens / 5000.0),
        tau_s=tau_s,
        weight=np.ones(arrival_s.size),
        **extra,
    )


def poisson(rate_per_s: float, duration_s: float, seed: int) -> Workload:
    """Poisson arrivals of chat requests."""
    rng = np.random.default_rng(seed)
    times = _thinning(rng, duration_s, rate_per_s, lambda t: np.full(t.size, rate_per_s))
    return chat_workload(f"poisson {rate_per_s:g}/s", times, rng)


def cyclic_bursts(
    rate_per_s: float,
    duration_s: float,
    seed: int,
    *,
    intensity: float = 2.0,
    width: float = 0.35,
    cycle_s: float = 1200.0,
) -> Workload:
    """Cycles that start with a burst; the mean rate stays ``rate_per_s``.

    Raises:
        ConfigError: ``intensity * width`` above 1 would need a negative rate between bursts.
    """
    if not 0 < width < 1 or intensity < 1 or intensity * width > 1:
        raise ConfigError("intensity", intensity, "at least 1 with intensity * width <= 1")
    high = rate_per_s * intensity
    low = rate_per_s * (1.0 - intensity * width) / (1.0 - width)
    rng = np.random.default_rng(seed)
    times = _thinning(
        rng, duration_s, high, lambda t: np.where((t % cycle_s) < width * cycle_s, high, low)
    )
    return chat_workload(f"cyclic {rate_per_s:g}/s", times, rng)


def random_bursts(
    rate_per_s: float,
    duration_s: float,
    seed: int,
    *,
    intensity: float = 2.0,
    bursts_per_hour: float = 3.0,
    burst_s: float = 420.0,
) -> Workload:
    """Bursts at random times and of random length on a base rate; the mean is ``rate_per_s``."""
    rng = np.random.default_rng(seed)
    starts = np.cumsum(rng.exponential(3600.0 / bursts_per_hour, size=64)) - burst_s
    lengths = rng.exponential(burst_s, size=starts.size)
    busy = min(0.9, bursts_per_hour * burst_s / 3600.0)
    base = rate_per_s / (1.0 - busy + busy * intensity)

    def rate(t: FloatArray) -> FloatArray:
        inside = (t[:, None] >= starts) & (t[:, None] < starts + lengths)
        return np.where(inside.any(axis=1), base * intensity, base)

    times = _thinning(rng, duration_s, base * intensity, rate)
    return chat_workload(f"random bursts {rate_per_s:g}/s", times, rng)


def azure_like(rate_per_s: float, duration_s: float, seed: int) -> Workload:
    """Generated requests with the means and medians of the Azure 2023 conversation trace.

    Prompts have mean 1,155 and median 1,020 tokens, answers mean 211 and median 129.
    """
    rng = np.random.default_rng(seed)
    times = _thinning(rng, duration_s, rate_per_s, lambda t: np.full(t.size, rate_per_s))
    prompt = np.clip(rng.lognormal(np.log(1020.0), 0.5, times.size), 4, 14_000).astype(np.int64)
    output = np.clip(rng.lognormal(np.log(129.0), 0.99, times.size), 1, 1000).astype(np.int64)
    return workload_of("azure-like", times, prompt, output, readers(rng, times.size))


def load_azure(path: Path, seed: int = 0) -> Workload:
    """Read a trace with columns TIMESTAMP, ContextTokens, GeneratedTokens (Azure LLM traces).

    Readers are drawn from the reading classes by ``seed``, because the trace has none.

    Raises:
        StorageError: the file cannot be read.
        DataError: columns or values are not what they must be.
    """
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            rows = list(csv.DictReader(lines))
    except OSError as error:
        raise StorageError(str(path), error.strerror or str(error)) from error
    try:
        stamps = [datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in rows]
        prompt = np.array([int(row["ContextTokens"]) for row in rows], dtype=np.int64)
        output = np.array([int(row["GeneratedTokens"]) for row in rows], dtype=np.int64)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(str(path), f"not in the Azure trace format: {error}") from error
    return _recorded(path, path.stem, np.array(stamps), prompt, output, seed)


def load_mooncake(path: Path, seed: int = 0) -> Workload:
    """Read JSON lines with timestamp (ms), input_length, output_length, hash_ids (Mooncake).

    Raises:
        StorageError: the file cannot be read.
        DataError: a line is not what it must be.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise StorageError(str(path), error.strerror or str(error)) from error
    try:
        rows = [json.loads(line) for line in lines if line.strip()]
        stamps = np.array([float(row["timestamp"]) / 1000.0 for row in rows])
        prompt = np.array([int(row["input_length"]) for row in rows], dtype=np.int64)
        output = np.array([int(row["output_length"]) for row in rows], dtype=np.int64)
        prefixes = tuple(tuple(int(h) for h in row.get("hash_ids", ())) for row in rows)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(str(path), f"not in the Mooncake trace format: {error}") from error
    return _recorded(path, path.stem, stamps, prompt, output, seed, prefix_ids=prefixes)


def _recorded(
    path: Path,
    name: str,
    stamps: FloatArray,
    prompt: IntArray,
    output: IntArray,
    seed: int,
    prefix_ids: tuple[tuple[int, ...], ...] = (),
) -> Workload:
    if stamps.size == 0:
        raise DataError(str(path), "holds no requests")
    if (prompt < 0).any() or (output < 0).any():
        raise DataError(str(path), "a length is negative")
    order = np.argsort(stamps, kind="stable")
    tau = readers(np.random.default_rng(seed), stamps.size)
    return workload_of(
        name,
        stamps[order] - stamps.min(),
        np.maximum(1, prompt[order]),
        np.maximum(1, output[order]),
        tau,
        prefix_ids=tuple(prefix_ids[i] for i in order) if prefix_ids else (),
    )


def _thinning(rng: Generator, duration_s: float, peak: float, rate: Any) -> FloatArray:
    """Arrival times of an inhomogeneous Poisson process by thinning."""
    if not (peak > 0 and duration_s > 0):
        raise ConfigError("rate_per_s", peak, "a positive rate and duration")
    count = rng.poisson(peak * duration_s)
    times = np.sort(rng.uniform(0.0, duration_s, count))
    kept: FloatArray = times[rng.random(count) * peak < rate(times)]
    return kept
