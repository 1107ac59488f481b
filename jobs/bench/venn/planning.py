"""What planning and simulating cost."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from raysys import machine
from raysys.bench import Claim, Profile, paired_claim
from raysys.federated.venn import baselines
from raysys.federated.venn.columns import RequestColumns
from raysys.federated.venn.irs import IRS, IRSConfig
from raysys.federated.venn.requests import Request
from raysys.federated.venn.supply import SupplyView


def full_even_simulation_s(profile: Profile) -> Claim:
    """Full-size even workload on one core, CPU seconds and resident memory (own process)."""
    command = [sys.executable, "-m", "jobs.bench.venn.full_size", str(profile.pick(5, 50))]
    output = subprocess.run(
        command, cwd=machine.app_root(), capture_output=True, text=True, check=True
    )
    measured = json.loads(output.stdout)
    return Claim(
        name="full_even_simulation_s",
        value=measured["cpu_s"],
        unit="s of one core",
        better="lower",
        samples=measured,
    )


def plan_ms(profile: Profile) -> Claim:
    """Time of one plan over columns (and from objects); the baseline is SRSF's sort of objects."""
    samples = {}
    for jobs, groups, atoms in ((50, 4, 5), (1000, 100, 256), (10_000, 100, 1024)):
        problem = _planning_problem(jobs, groups, atoms)
        requests, view = problem
        columns = RequestColumns.of(requests)
        planner = IRS(IRSConfig(demand_scope="total", yield_factor=2.0))
        ours = _milliseconds(partial(planner.plan_columns, columns, view), profile)
        objects = _milliseconds(partial(planner.plan, requests, view, 0.0), profile)
        srsf = baselines.srsf_total()
        theirs = _milliseconds(partial(srsf.plan, requests, view, 0.0), profile)
        samples[f"{jobs}x{groups}"] = {"ours": ours, "from_objects": objects, "srsf": theirs}
    main = samples["1000x100"]
    return paired_claim(
        "plan_ms",
        "ms for 1,000 jobs in 100 groups",
        "lower",
        ours=main["ours"],
        baseline_name="SRSF's sort",
        baseline=main["srsf"],
        extra={
            name: {side: statistics.median(values) for side, values in sides.items()}
            for name, sides in samples.items()
        },
    )


def _planning_problem(jobs: int, groups: int, atoms: int) -> tuple[list[Request], SupplyView]:
    generator = np.random.default_rng(jobs)
    masks = [
        sum(1 << int(group) for group in set(generator.integers(0, groups, 10).tolist()))
        for _ in range(atoms)
    ]
    view = SupplyView.build(masks, generator.random(atoms).tolist(), groups)
    sizes, owners = generator.integers(1, 2000, jobs), generator.integers(0, groups, jobs)
    requests = [
        Request(
            job=i,
            group=int(owners[i]),
            demand=int(sizes[i]),
            remaining=int(sizes[i]),
            rounds=100,
            opened_s=float(i % 97),
        )
        for i in range(jobs)
    ]
    return requests, view


def _milliseconds(work: Callable[[], object], profile: Profile) -> list[float]:
    work()
    times = []
    for _ in range(profile.pick(20, 100)):
        started_s = time.process_time()
        work()
        times.append(1000 * (time.process_time() - started_s))
    return times
