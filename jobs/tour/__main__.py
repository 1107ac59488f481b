"""Run one small, real demonstration of every system and write a report.

Each stage runs as Ray actors or tasks on real data. A stage that this machine cannot run says why
and how to get it, and the tour goes on.
"""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from actors.session import Session
from jobs.launcher import Job, JobContext, Summary, main
from jobs.tour.outcome import Outcome, console_table, render_report
from jobs.tour.registry import load_stages, stage_names
from jobs.tour.stage import Profile, Stage, StageContext
from raysys import machine
from raysys.config import check_range
from raysys.errors import CapabilityError, InterruptedRunError, StorageError

REPORT = "report.html"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TourConfig:
    """The tour.

    Args:
        profile: ``standard``, or ``smoke`` for a few seconds a stage.
        stages: names of the stages to run; empty means all.
        seed: seed of everything random.
    """

    profile: Profile = "standard"
    stages: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check_range(self, "seed", 0)


def run(config: TourConfig, context: JobContext) -> Summary:
    """Run the stages one after the other and write the report."""
    stages = load_stages(config.stages)
    started = time.monotonic()
    session = context.ray()
    outcomes = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=context.console) as bar:
        tasks = [bar.add_task(f"{stage.name}: waiting", total=1, start=False) for stage in stages]
        for stage, task in zip(stages, tasks):
            bar.start_task(task)
            stage_context = StageContext(
                profile=config.profile,
                seed=config.seed,
                session=session,
                run=context.run,
                progress=_mover(bar, task, stage.name),
            )
            outcome = run_stage(stage, stage_context)
            bar.update(task, completed=1, total=1, description=f"{stage.name}: {outcome.state}")
            bar.stop_task(task)
            outcomes.append(outcome)
            _record(context, outcome)
            context.run.write_json("tour.json", [known.to_json() for known in outcomes])
    return _conclude(context, outcomes, session, time.monotonic() - started)


def run_stage(stage: Stage, context: StageContext) -> Outcome:
    """Run one stage; what goes wrong becomes an outcome, so that the tour goes on.

    Raises:
        InterruptedRunError: the user asked the whole tour to stop.
        StorageError: the run directory failed, which every later stage needs as well.
    """
    started = time.monotonic()
    try:
        result = stage.run(context)
    except (InterruptedRunError, StorageError):
        raise
    except CapabilityError as error:
        return Outcome(stage=stage, duration_s=time.monotonic() - started, missing=str(error))
    except Exception as error:
        context.run.storage.write(f"errors/{stage.name}.txt", traceback.format_exc().encode())
        reason = f"{type(error).__name__}: {error}".split("\n", 1)[0]
        failure = f"{reason} (trace in errors/{stage.name}.txt of the run)"
        return Outcome(stage=stage, duration_s=time.monotonic() - started, failure=failure)
    return Outcome(stage=stage, duration_s=time.monotonic() - started, result=result)


def _mover(bar: Progress, task: TaskID, name: str) -> Callable[[float, float, str], None]:
    def move(done: float, total: float, text: str) -> None:
        bar.update(task, completed=done, total=total, description=f"{name}: {text}")

    return move


def _record(context: JobContext, outcome: Outcome) -> None:
    context.metrics.record(
        "tour_stage_seconds", outcome.duration_s, tags={"stage": outcome.stage.name}
    )
    context.metrics.event("stage", name=outcome.stage.name, state=outcome.state)


def _conclude(
    context: JobContext, outcomes: list[Outcome], session: Session, duration_s: float
) -> Summary:
    host = machine.describe()
    packages = ", ".join(f"{name} {version}" for name, version in host["packages"].items())
    lead = (
        f"{len(outcomes)} of the house's systems, each run for real on this machine "
        f"({host['cpu']}, {host['cores']} cores, {host['memory_gib']} GiB)."
    )
    footer = f"{host['platform']}; Python {host['python']}; {packages}; {duration_s:.0f} s in all."
    page = render_report(outcomes, lead, footer)
    context.run.storage.write(REPORT, page.encode())
    context.console.print(console_table(outcomes))
    failed = [outcome for outcome in outcomes if outcome.failure]
    lines = [f"{outcome.stage.name}: {outcome.missing}" for outcome in outcomes if outcome.missing]
    lines += [f"{outcome.stage.name}: FAILED: {outcome.failure}" for outcome in failed]
    ran = sum(outcome.result is not None for outcome in outcomes)
    where = "private local Ray" if session.private else "the given cluster"
    lines.append(f"{ran} of {len(outcomes)} stages ran on {where} in {duration_s:.0f} s")
    return Summary(lines=lines, report=REPORT, exit_code=1 if failed else 0)


JOB = Job(
    name="tour",
    config=TourConfig,
    run=run,
    description=f"{__doc__}\nstages in the house: {', '.join(stage_names())}",
    flags=("profile",),
)

if __name__ == "__main__":
    raise SystemExit(main(JOB))
