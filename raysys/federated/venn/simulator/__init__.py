"""Trace-driven simulation of many federated jobs over one population of devices."""

from raysys.federated.venn.simulator.engine import simulate
from raysys.federated.venn.simulator.jobs import SimConfig, SimJob
from raysys.federated.venn.simulator.reference import simulate_by_event
from raysys.federated.venn.simulator.results import JobResult, SimResult
from raysys.federated.venn.simulator.trace import Trace
from raysys.federated.venn.simulator.workloads import Workload, make_workload

__all__ = [
    "JobResult",
    "SimConfig",
    "SimJob",
    "SimResult",
    "Trace",
    "Workload",
    "make_workload",
    "simulate",
    "simulate_by_event",
]
