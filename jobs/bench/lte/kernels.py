"""Claims about LTE's CPU kernel and about the accounting of FLOPs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from raysys import machine
from raysys.bench import Baseline, Claim, Profile
from raysys.ops import lte_ops
from raysys.ops.lte_crossover import calibrate
from raysys.training.lte import flops

EXPERT = 32
SMALL, LARGE = (576, 1536), (4096, 11008)
# GiFLOPs per token and FFN sparsity of the paper's table 1, for LTE on LLaMA-7B.
PAPER_TABLE = {"XSum": (5.38, 0.839), "E2E": (4.65, 0.930), "WikiText-103": (6.59, 0.689)}
SLICE_S = 0.02
NEAR = 0.15  # a share of the bar
Bars = dict[tuple[int, float], float]  # by width and sparsity


def flops_accounting(profile: Profile) -> Claim:
    """Largest distance to the paper's figures for LLaMA-7B, in GiFLOPs or in sparsity."""
    shape = flops.LLAMA_7B
    found = {
        "attention": 2 * shape.attention_weights / flops.GI,
        "ffn": 2 * shape.ffn_weights / flops.GI,
        "dense": flops.paper(shape, routers=False),
        "routers": 2 * shape.router_weights / flops.GI,
    }
    wanted = {"attention": 4.0, "ffn": 8.0625, "dense": 12.0625, "routers": 0.084}
    distances = {name: abs(found[name] - value) for name, value in wanted.items()}
    rows = {}
    for name, (gflops, sparsity) in PAPER_TABLE.items():
        rows[name] = flops.implied_sparsity(shape, gflops)
        distances[name] = abs(rows[name] - sparsity)
    return Claim(
        name="flops_accounting",
        value=max(distances.values()),
        unit="GiFLOPs or sparsity, largest distance to the paper's printed digits",
        better="lower",
        samples={"found": found, "implied_sparsity": rows, "distance": distances},
    )


class Layer:
    """One FFN with random weights, dense as torch computes it and sparse as the operator does."""

    def __init__(self, size: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> None:
        hidden, neurons = size
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            values: Tensor = torch.randn(*shape, generator=generator) * shape[-1] ** -0.5
            return values.to(dtype)

        self.generator, self.dtype, self.hidden = generator, dtype, hidden
        self.w_in = draw(2 * neurons, hidden)
        self.w_out = draw(neurons, hidden)
        self.router = torch.randn(neurons // EXPERT, hidden, generator=generator) / hidden**0.5
        self.gate, self.up = self.w_in[:neurons].clone(), self.w_in[neurons:].clone()
        self.down = self.w_out.T.contiguous()
        layer, _ = lte_ops.prepared(self.w_in, self.w_out, None, self.router, None, "silu")
        calibrate(layer, machine.cache_dir())
        lte_ops.forget(layer)

    def dense(self, x: Tensor) -> Tensor:
        """What torch does: three linear maps, each with the weight as it wants it."""
        a = functional.silu(functional.linear(x, self.gate)) * functional.linear(x, self.up)
        return functional.linear(a, self.down)

    def ratio(
        self, tokens: int, sparsity: float, repeats: int, bar: float | None = None
    ) -> dict[str, Any]:
        """Dense time over sparse time, interleaved; medians of CPU time of this thread.

        A case near its bar, on either side, takes five times the repeats.
        """
        x = torch.randn(tokens, self.hidden, generator=self.generator).to(self.dtype)
        logits = functional.linear(x.float(), self.router).flatten()
        threshold = float(logits.quantile(sparsity)) if sparsity else float(logits.min()) - 1.0

        def sparse() -> Tensor:
            y: Tensor = lte_ops.ffn(
                x, self.w_in, self.w_out, None, self.router, None, threshold, "silu"
            )
            return y

        sparse()

        def measured(count: int) -> list[tuple[float, float]]:
            return [(_time(lambda: self.dense(x)), _time(sparse)) for _ in range(count)]

        pairs = measured(repeats)
        if bar is not None and abs(_speedup(pairs) / bar - 1.0) < NEAR:
            pairs += measured(4 * repeats)
        return {
            "tokens": tokens,
            "sparsity": float((logits <= threshold).float().mean()),
            "dense_us": statistics.median(d for d, _ in pairs) * 1e6,
            "sparse_us": statistics.median(s for _, s in pairs) * 1e6,
            "speedup": _speedup(pairs),
            "repeats": len(pairs),
        }


def _speedup(pairs: list[tuple[float, float]]) -> float:
    return statistics.median(dense / sparse for dense, sparse in pairs)


def _time(run: Callable[[], object]) -> float:
    started, count = time.thread_time(), 0
    while True:
        run()
        count += 1
        took = time.thread_time() - started
        if took >= SLICE_S and count >= 2:
            return took / count


def _table(
    profile: Profile, cases: list[tuple[tuple[int, int], torch.dtype, int, float]], bars: Bars
) -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows, layers = [], {}
        for size, dtype, tokens, sparsity in cases:
            key = (size, dtype)
            if key not in layers:
                layers = {key: Layer(size, dtype)}
            bar = bars[size[0], sparsity]
            row = layers[key].ratio(tokens, sparsity, profile.pick(5, 9), bar)
            row |= {"asked": sparsity, "bar": bar, "of_bar": row["speedup"] / bar}
            rows.append({"size": list(size), "dtype": str(dtype).removeprefix("torch."), **row})
        lte_ops.release()
        return rows
    finally:
        torch.set_num_threads(threads)


def _speed_claim(name: str, rows: list[dict[str, Any]]) -> Claim:
    """The figure farthest below its bar, as a share of the bar, with the whole table."""
    worst = min(rows, key=lambda row: row["of_bar"])
    return Claim(
        name=name,
        value=worst["speedup"],
        unit="times torch's dense FFN, where it is farthest from its bar",
        better="higher",
        baseline=Baseline(name="bar of that case", value=worst["bar"]),
        ratio=worst["of_bar"],
        samples=rows,
        seeds=[0],
    )


def ffn_speedup(profile: Profile) -> Claim:
    """Batch 1, router included, one thread, against torch's dense FFN of the same type."""
    bf16, fp32 = torch.bfloat16, torch.float32
    cases = [(SMALL, bf16, 1, s) for s in (0.5, 0.8, 0.9)]
    cases += [(LARGE, bf16, 1, s) for s in (0.5, 0.8, 0.9)]
    cases += [(SMALL, fp32, 1, s) for s in (0.5, 0.8, 0.9)]
    bars = {(576, 0.5): 1.8, (576, 0.8): 4.0, (576, 0.9): 4.0}
    bars |= {(4096, 0.5): 1.8, (4096, 0.8): 4.5, (4096, 0.9): 4.5}
    return _speed_claim("ffn_speedup", _table(profile, cases, bars))


def ffn_speedup_batched(profile: Profile) -> Claim:
    """Batches of 4 to 32 tokens that choose independently, the worst case for sharing."""
    bf16 = torch.bfloat16
    cases = [(SMALL, bf16, t, s) for t in (4, 8, 16, 32) for s in (0.5, 0.8)]
    cases += [(LARGE, bf16, t, s) for t in profile.pick((4,), (4, 16, 32)) for s in (0.5, 0.8)]
    bars = {(d, s): bar for d in (576, 4096) for s, bar in ((0.5, 1.3), (0.8, 2.2))}
    return _speed_claim("ffn_speedup_batched", _table(profile, cases, bars))


def ffn_never_slower(profile: Profile) -> Claim:
    """Every sparsity from none on and every batch up to 128: the dispatcher must not lose."""
    bf16, fp32 = torch.bfloat16, torch.float32
    sparsities = (0.0, 0.25, 0.5)
    cases = [(SMALL, d, t, s) for d in (bf16, fp32) for t in (1, 8, 32, 128) for s in sparsities]
    if profile.full:
        cases += [(LARGE, bf16, t, s) for t in (1, 16, 64) for s in sparsities]
    bars = {(d, s): 0.95 for d in (576, 4096) for s in sparsities}
    return _speed_claim("ffn_never_slower", _table(profile, cases, bars))
