"""Speed of the store, measured alternately with public embedding kernels.

The reference workload: 8 tables x 500,000 rows x 64 floats, batch 4,096, one id per field, Zipf
1.05 over a random permutation, one thread, CPU time. The quick profile has a tenth of the rows.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from raysys.bench import Claim, Profile, paired_claim
from raysys.errors import CapabilityError
from raysys.training.fiited import FiitedConfig, FiitedEmbeddingBag, FiitedStore, TableSpec
from raysys.training.fiited.store import aligned_empty

TABLES, DIM, BATCH = 8, 64, 4096
RATIO = 0.9325
Step = Callable[[int], None]
Weights = Literal["fp32", "bf16"]


class Workload:
    """Pre-made batches, and one step of every contender."""

    def __init__(self, rows: int, batches: int) -> None:
        torch.set_num_threads(1)
        rng = np.random.default_rng(0)
        tail = np.cumsum(np.arange(1, rows + 1, dtype=np.float64) ** -1.05)
        orders = [rng.permutation(rows) for _ in range(TABLES)]
        self.rows = rows
        self.ids = [
            [order[np.searchsorted(tail, rng.random(BATCH) * tail[-1])] for order in orders]
            for _ in range(batches)
        ]
        # All tables' ids one after the other: the layout that FBGEMM asks for, and that ours takes.
        self.joined = [torch.from_numpy(np.concatenate(ids)) for ids in self.ids]
        self.grad = aligned_empty(BATCH, TABLES * DIM)
        self.grad[:] = rng.standard_normal((BATCH, TABLES * DIM)) * 0.01
        self.specs = tuple(TableSpec(name=f"t{i}", dim=DIM, rows=rows) for i in range(TABLES))

    def full(self, weights: Weights = "fp32") -> FiitedEmbeddingBag:
        """Every row at full width through directory and slabs."""
        config = FiitedConfig(
            budget_ratio=0.0, admit_after=0, cadence="manual", slack=0.0, weights=weights
        )
        bag = FiitedEmbeddingBag(self.specs, config, engine="native")
        for low in range(0, self.rows, 4 * BATCH):
            some = np.arange(low, min(self.rows, low + 4 * BATCH))
            bag.store.lookup([some] * TABLES, train=True)
        return bag

    def pruned(self, weights: Weights = "fp32") -> FiitedEmbeddingBag:
        """93.25% of chunks pruned, continuous adjustment on, trained until the pool is full."""
        config = FiitedConfig(budget_ratio=RATIO, slack=0.01, weights=weights)
        bag = FiitedEmbeddingBag(self.specs, config, engine="native")
        step = self.step(bag)
        for index in range(150):
            step(index)
        return bag

    def step(self, bag: FiitedEmbeddingBag) -> Step:
        """Forward, backward with the fused update, adjustment: what a training loop calls."""
        grad = torch.from_numpy(self.grad)

        def run(index: int) -> None:
            bag(self.joined[index % len(self.joined)]).backward(grad)
            bag.end_step()

        return run


@functools.cache
def _workload(full: bool) -> Workload:
    return Workload(500_000 if full else 50_000, 96 if full else 24)


def alternate(steps: dict[str, Step], rounds: int, length: int) -> dict[str, list[float]]:
    """Median CPU milliseconds per step of every contender, in rounds of A, B, ... A, B."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            found[name].append(statistics.median(_cpu_ms(step, i) for i in range(length)))
    return found


def step_vs_fbgemm(profile: Profile) -> Claim:
    """Fused step at 93.25% pruned against FBGEMM, exact row-wise Adagrad; full width too."""
    load = _workload(profile.full)
    steps = {
        "pruned": load.step(load.pruned()),
        "full": load.step(load.full()),
        "fbgemm": _fbgemm(load),
    }
    found = alternate(steps, profile.pick(5, 9), len(load.ids))
    return _rate_claim(
        "step_vs_fbgemm", found, "pruned", "fbgemm", "FBGEMM CPU, exact row-wise Adagrad"
    )


def step_vs_embeddingbag(profile: Profile) -> Claim:
    """Fused step at 93.25% pruned against EmbeddingBag with sparse gradients and Adagrad."""
    load = _workload(profile.full)
    steps = {
        "pruned": load.step(load.pruned()),
        "adagrad": _embedding_bag(load, torch.optim.Adagrad),
        "sparse_adam": _embedding_bag(load, torch.optim.SparseAdam),
    }
    found = alternate(steps, profile.pick(3, 7), profile.pick(8, 24))
    return _rate_claim("step_vs_embeddingbag", found, "pruned", "adagrad", "EmbeddingBag + Adagrad")


def indirection_tax(profile: Profile) -> Claim:
    """Step through directory and slabs over the same kernel on a plain dense table."""
    load = _workload(profile.full)
    config = FiitedConfig(budget_ratio=0.0, cadence="manual")
    dense = FiitedEmbeddingBag(load.specs, config, engine="native", dense=True)
    steps = {"slabs": load.step(load.full()), "dense": load.step(dense)}
    found = alternate(steps, profile.pick(5, 9), len(load.ids))
    return paired_claim(
        "indirection_tax",
        "ms per step",
        "lower",
        ours=found["slabs"],
        baseline_name="same kernel, dense table",
        baseline=found["dense"],
    )


def bf16_step(profile: Profile) -> Claim:
    """Step with bfloat16 weights over fp32 ones at 93.25% pruned; full width in the samples."""
    load = _workload(profile.full)
    bags = {
        f"{name} {weights}": getattr(load, name)(weights)
        for name in ("pruned", "full")
        for weights in ("fp32", "bf16")
    }
    steps = {name: load.step(bag) for name, bag in bags.items()}
    found = alternate(steps, profile.pick(5, 9), len(load.ids))
    full = [b / a for a, b in zip(found["full bf16"], found["full fp32"])]
    return paired_claim(
        "bf16_step",
        "steps per CPU second",
        "higher",
        ours=[1e3 / ms for ms in found["pruned bf16"]],
        baseline_name="fp32 weights",
        baseline=[1e3 / ms for ms in found["pruned fp32"]],
        extra={
            "milliseconds": found,
            "full_width_ratios": full,
            "mapped_bytes": {name: bag.stats()["mapped_bytes"] for name, bag in bags.items()},
        },
    )


def lookup_vs_embeddingbag(profile: Profile) -> Claim:
    """Lookup alone at 93.25% pruned against EmbeddingBag's forward pass."""
    load = _workload(profile.full)
    store = load.pruned().store
    bags = [nn.EmbeddingBag(load.rows, DIM, mode="sum") for _ in range(TABLES)]
    starts = torch.arange(BATCH)

    def ours(index: int) -> None:
        store.lookup(load.ids[index % len(load.ids)])

    def theirs(index: int) -> None:
        with torch.no_grad():
            ids = load.ids[index % len(load.ids)]
            torch.cat([bag(torch.from_numpy(i), starts) for bag, i in zip(bags, ids)], 1)

    found = alternate({"ours": ours, "torch": theirs}, profile.pick(5, 9), len(load.ids))
    return _rate_claim("lookup_vs_embeddingbag", found, "ours", "torch", "EmbeddingBag forward")


def adjust_4m_ms(profile: Profile) -> Claim:
    """One full adjustment round over 4 million rows of 4 chunks; the rows are the same in quick."""
    rows, k = 4_000_000, 4
    config = FiitedConfig(
        chunk=4,
        budget_slots=rows * k // 2,
        admit_after=0,
        cadence="manual",
        optimizer="sgd",
        compact=False,
        min_alive=0,
    )
    store = FiitedStore(config, (TableSpec(name="t", dim=16, rows=rows),), engine="native")
    rng = np.random.default_rng(0)
    grow = store.slots // k
    for low in range(0, grow, 50_000):
        _train_rows(store, np.arange(low, min(grow, low + 50_000)), rng)
    store.adjust()
    for low in range(grow, rows, 50_000):  # the other rows ask for memory and get one chunk each
        _train_rows(store, np.arange(low, min(rows, low + 50_000)), rng)
    for _ in range(40):
        store.adjust()
    times, turned = [], []
    for _ in range(profile.pick(3, 7)):
        for low in rng.integers(0, rows - 50_000, 8):
            _train_rows(store, np.arange(low, low + 50_000), rng)
        before = store.engine.counters()
        start = time.process_time()
        store.engine.round()
        times.append(1e3 * (time.process_time() - start))
        after = store.engine.counters()
        turned.append((after["grown"] - before["grown"]) / store.slots)
    resident = store.engine.counters()["rows"]
    samples = {"ms": times, "turned_over": turned, "resident_rows": resident, "chunks": k}
    return Claim(
        name="adjust_4m_ms",
        value=statistics.median(times),
        unit="ms of one core",
        better="lower",
        samples=samples,
    )


def step_p99(profile: Profile) -> Claim:
    """99th percentile over median of the CPU time of a step in continuous mode.

    Beside it, in turn, the step at full width: it has no slices, so what it shows is the machine's.
    """
    load = _workload(profile.full)
    steps = {"pruned": load.step(load.pruned()), "full": load.step(load.full())}
    shares: dict[str, list[float]] = {name: [] for name in steps}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(profile.pick(3, 7)):
        for name, step in steps.items():
            some = [_cpu_ms(step, index) for index in range(200)]
            shares[name].append(float(np.percentile(some, 99)) / statistics.median(some))
            times[name] += some
    return paired_claim(
        "step_p99",
        "p99 / median of 200 steps",
        "lower",
        ours=shares["pruned"],
        baseline_name="the step at full width, which has no slices",
        baseline=shares["full"],
        extra={name: _spread(some) for name, some in times.items()},
    )


def _cpu_ms(step: Step, index: int) -> float:
    start = time.process_time()
    step(index)
    return 1e3 * (time.process_time() - start)


def _spread(times: list[float]) -> dict[str, float]:
    shares = {"median_ms": 50, "p90_ms": 90, "p99_ms": 99, "longest_ms": 100}
    return {name: float(np.percentile(times, share)) for name, share in shares.items()}


def _rate_claim(
    name: str, found: dict[str, list[float]], ours: str, baseline: str, baseline_name: str
) -> Claim:
    """Steps per CPU second; every contender's milliseconds and ratios go into the samples."""
    ratios = {
        f"{other}_over_{mine}": [b / a for a, b in zip(found[mine], found[other])]
        for mine in found
        for other in found
        if mine in ("pruned", "full", "ours") and other not in ("pruned", "full", "ours")
    }
    return paired_claim(
        name,
        "steps per CPU second",
        "higher",
        ours=[1e3 / ms for ms in found[ours]],
        baseline_name=baseline_name,
        baseline=[1e3 / ms for ms in found[baseline]],
        extra={"milliseconds": found, "ratios": ratios},
    )


def _fbgemm(load: Workload) -> Step:
    try:
        import fbgemm_gpu.split_table_batched_embeddings_ops_training as ops
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
    except (ImportError, OSError) as error:
        raise CapabilityError(
            "FBGEMM's CPU kernels",
            str(error),
            "pip install --no-deps fbgemm-gpu-cpu==1.8.0 (the release built for torch 2.13)",
        ) from error
    host = (ops.EmbeddingLocation.HOST, ops.ComputeDevice.CPU)
    layer: Any = ops.SplitTableBatchedEmbeddingBagsCodegen(
        [(load.rows, DIM, *host)] * TABLES,
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.05,
        eps=1e-8,
    )
    layer.init_embedding_weights_uniform(-0.1, 0.1)
    offsets, grad = torch.arange(TABLES * BATCH + 1), torch.from_numpy(load.grad)

    def run(index: int) -> None:
        layer(load.joined[index % len(load.joined)], offsets).backward(grad)

    return run


def _embedding_bag(load: Workload, rule: Any) -> Step:
    bags = [nn.EmbeddingBag(load.rows, DIM, mode="sum", sparse=True) for _ in range(TABLES)]
    optimizer = rule([bag.weight for bag in bags], lr=0.05)
    starts, grad = torch.arange(BATCH), torch.from_numpy(load.grad)

    def run(index: int) -> None:
        ids = load.ids[index % len(load.ids)]
        out = torch.cat([bag(torch.from_numpy(i), starts) for bag, i in zip(bags, ids)], 1)
        out.backward(grad)  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return run


def _train_rows(store: FiitedStore, ids: np.ndarray, rng: np.random.Generator) -> None:
    out, batch = store.lookup([ids], train=True)
    grad = (rng.standard_normal(out.shape) * rng.random((len(ids), 1))).astype(np.float32)
    store.update(batch, grad)
    store.engine.end_step(0, 0)
