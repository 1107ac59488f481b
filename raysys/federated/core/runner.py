"""Runs a federated job in this process: for tests, notebooks and small studies."""

from __future__ import annotations

from collections.abc import Callable

from raysys.federated.core.engine import FederatedJob
from raysys.federated.core.strategy import RoundReport
from raysys.federated.core.training import Samples, train_task


def run_round(job: FederatedJob, samples: Samples) -> RoundReport:
    """Run one round, repeating it where the engine says so.

    Raises:
        InfeasibleError: the round failed several times in a row.
    """
    while True:
        opened = job.open_round()
        for number, group in enumerate(opened.groups):
            for task, controls in zip(group.tasks, group.controls_of_task):
                partial = train_task(task, group.weights, samples, job.population, controls)
                opened.add(number, partial)
        report = job.close_round(opened)
        if report is not None:
            return report


def run_rounds(
    job: FederatedJob,
    samples: Samples,
    rounds: int,
    on_round: Callable[[RoundReport], None] | None = None,
) -> list[RoundReport]:
    """Run rounds up to number ``rounds``, counted from the start of the job."""
    reports = []
    while job.round_id < rounds:
        report = run_round(job, samples)
        reports.append(report)
        if on_round is not None:
            on_round(report)
    return reports
