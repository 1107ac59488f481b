"""Run a workload under a policy and report what its readers saw."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raysys.serving.andes.qoe import final_qoe
from raysys.serving.andes.simulator.engine import EngineConfig, Policy, SimEngine, SimStats
from raysys.serving.andes.simulator.workload import Workload
from raysys.serving.andes.snapshot import FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class SimResult:
    """Outcome of one run; arrays have one entry per request of the workload.

    Args:
        qoe: final score.
        ttft_s: seconds from submission to the first token.
        preemptions: pauses and evictions of the request.
        throughput: output tokens per second from the first arrival to the last token.
        busy_throughput: output tokens per second in which the engine had work.
        stats: the engine's totals.
    """

    policy: str
    qoe: FloatArray
    ttft_s: FloatArray
    preemptions: IntArray
    throughput: float
    busy_throughput: float
    stats: SimStats

    @property
    def mean_qoe(self) -> float:
        return float(self.qoe.mean()) if self.qoe.size else 1.0

    @property
    def p10_qoe(self) -> float:
        return float(np.percentile(self.qoe, 10)) if self.qoe.size else 1.0

    def row(self) -> dict[str, float]:
        """JSON-ready figures."""
        requests = max(1, self.qoe.size)
        return {
            "mean_qoe": self.mean_qoe,
            "p10_qoe": self.p10_qoe,
            "share_good": float((self.qoe >= 0.95).mean()) if self.qoe.size else 1.0,
            "mean_ttft_s": float(self.ttft_s.mean()) if self.qoe.size else 0.0,
            "throughput": self.throughput,
            "busy_throughput": self.busy_throughput,
            "preemptions_per_request": float(self.preemptions.sum()) / requests,
            "peak_waiting": float(self.stats.peak_waiting),
        }


def simulate(workload: Workload, config: EngineConfig, policy: Policy) -> SimResult:
    """Serve every request of ``workload`` to completion; deterministic."""
    engine = SimEngine(workload, config, policy)
    engine.run()
    size = workload.size
    tokens, lag, delay = engine.final[:, :size]
    start = float(workload.arrival_s[0]) if size else 0.0
    span = max(1e-9, float(engine.finish_s[:size].max(initial=start)) - start)
    return SimResult(
        policy=policy.name,
        qoe=final_qoe(tokens, lag, delay, workload.tau_s),
        ttft_s=engine.first_s[:size] - workload.arrival_s,
        preemptions=engine.preempted[:size],
        throughput=workload.output_total / span,
        busy_throughput=workload.output_total / max(1e-9, engine.stats.busy_s),
        stats=engine.stats,
    )
