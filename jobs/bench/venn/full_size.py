"""One full-size simulation in a process of its own, so that its time and memory are its own.

``python -m jobs.bench.venn.full_size JOBS`` prints a JSON line.
"""

from __future__ import annotations

import json
import resource
import sys
import time

from raysys import machine
from raysys.federated.venn.irs import IRS, IRSConfig
from raysys.federated.venn.simulator import simulate
from raysys.federated.venn.simulator.loaders import generated_trace, load_trace
from raysys.federated.venn.simulator.workloads import WorkloadConfig, make_workload

DEVICES = 107_749


def measure(jobs: int) -> dict[str, float]:
    """Simulate the even workload at full size with the first ``jobs`` jobs."""
    folder = machine.data_dir()
    trace = load_trace(folder, DEVICES) if folder else generated_trace(1_600_000)
    workload = make_workload(WorkloadConfig(jobs=jobs, scale_devices=1, scale_rounds=1))
    started_s = time.process_time()
    policy = IRS(IRSConfig(demand_scope="total", yield_factor=2.0))
    result = simulate(trace, workload.jobs, policy, workload.config())
    cpu_s = time.process_time() - started_s
    return {
        "cpu_s": cpu_s,
        "max_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "rounds": sum(job.rounds_done for job in result.jobs),
        "attempts": sum(job.rounds_done + job.aborted for job in result.jobs),
        "events": result.events,
        "checkins": result.checkins,
        "checkins_per_period": len(trace),
        "mean_jct_s": result.mean_jct_s(),
    }


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
