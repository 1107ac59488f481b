"""Andes' claims about the planner: how long a plan takes, and how much greedy packing loses."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from raysys.bench import Baseline, Claim, ClaimFunction, Profile
from raysys.serving.andes.packing import exact_pack, greedy_order, greedy_pack, pack
from raysys.serving.andes.scheduler import AndesScheduler
from raysys.serving.andes.spec import READING_CLASSES, QoESpec
from raysys.serving.andes.table import RequestTable


def overloaded_table(requests: int, seed: int) -> tuple[RequestTable, Any, float]:
    """A crowded engine: a full batch and a long queue of new and paused requests."""
    rng = np.random.default_rng(seed)
    table = RequestTable(requests)
    taus = [row.tau_s for row in READING_CLASSES]
    for _ in range(requests):
        spec = QoESpec(ttft_s=1.0, tds=1.0 / float(rng.choice(taus)))
        age = float(rng.uniform(0.0, 120.0))
        slot = table.add(spec, -age, int(rng.lognormal(5.0, 1.0)) + 4)
        made = int(rng.integers(0, 12) * age) if rng.random() < 0.6 else 0
        if made:
            table.deliver_chunk(slot, -rng.uniform(0.0, age), made)
            table.context_tokens[slot] += made
    slots = table.live_slots()
    capacity = 60.0 * requests
    full = np.cumsum(table.context_tokens[slots]) < 0.98 * capacity
    running = slots[full]
    table.running[running] = table.pausable[running] = True
    table.missing_tokens[running] = 0.0
    waiting = slots[~full]
    table.missing_tokens[waiting] = table.context_tokens[waiting]
    return table, slots, capacity


def _plan_times_ms(requests: int, repeats: int, seeds: Sequence[int]) -> list[float]:
    times = []
    for seed in seeds:
        table, slots, capacity = overloaded_table(requests, seed)
        held = float(table.context_tokens[slots][table.running[slots]].sum())
        scheduler = AndesScheduler()
        for repeat in range(repeats + 3):
            started = time.thread_time()
            snapshot = table.snapshot(
                repeat * 0.08,
                slots,
                capacity_tokens=capacity,
                free_tokens=capacity - held,
                max_batch=4096,
                step_tokens=2048,
            )
            scheduler.plan(snapshot)
            if repeat >= 3:  # the first calls fill caches
                times.append(1000.0 * (time.thread_time() - started))
    return times


def _plan_claim(profile: Profile, requests: int) -> Claim:
    seeds = list(profile.pick(range(1, 4), range(1, 6)))
    times = _plan_times_ms(requests, profile.pick(100, 400), seeds)
    return Claim(
        name=f"plan_ms_p99_{requests}",
        value=float(np.percentile(times, 99)),
        unit="ms",
        better="lower",
        samples={"median": statistics.median(times), "max": max(times), "plans": len(times)},
        seeds=seeds,
    )


def plan_ms_p99_500(profile: Profile) -> Claim:
    """Processor time of a snapshot and a plan for 500 live requests."""
    return _plan_claim(profile, 500)


def plan_ms_p99_5000(profile: Profile) -> Claim:
    """Processor time of a snapshot and a plan for 5,000 live requests."""
    return _plan_claim(profile, 5000)


def dp_gap(profile: Profile) -> Claim:
    """How far greedy packing stays below dynamic programming, on random instances."""
    rng = np.random.default_rng(1)
    gaps, literal = [], []
    spent = {"greedy": 0.0, "exact": 0.0}
    for _ in range(1000):
        size = int(rng.integers(8, 20))
        weight = np.maximum(1, rng.lognormal(3.2, 0.8, size)).astype(np.int64)
        value = rng.uniform(0.0, 1.0, size)
        batch = int(rng.integers(2, size + 1))
        room = int(rng.uniform(0.2, 0.9) * weight.sum())
        started = time.thread_time()
        size_N = weight.astype(np.float64)
        chosen = greedy_pack(value, size_N, batch, room)
        middle = time.thread_time()
        best = float(value[exact_pack(value, weight, batch, room)].sum())
        spent["greedy"] += middle - started
        spent["exact"] += time.thread_time() - middle
        if best > 0:
            gaps.append(1.0 - float(value[chosen].sum()) / best)
            order = greedy_order(value, size_N)
            stop = pack(order, value, size_N, batch, room, skip_misfits=False)
            literal.append(1.0 - float(value[stop].sum()) / best)
    return Claim(
        name="dp_gap",
        value=statistics.mean(gaps),
        unit="share of the optimum lost",
        better="lower",
        baseline=Baseline(
            name="by value per length, stop at misfit", value=statistics.mean(literal)
        ),
        ratio=statistics.mean(gaps) / statistics.mean(literal),
        samples={"worst": max(gaps), "speedup": spent["exact"] / spent["greedy"]},
        seeds=[1],
    )


CLAIMS: dict[str, ClaimFunction] = {
    "plan_ms_p99_500": plan_ms_p99_500,
    "plan_ms_p99_5000": plan_ms_p99_5000,
    "dp_gap": dp_gap,
}
