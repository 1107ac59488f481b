"""What every job shares: arguments, run directory, Ray session, progress, signals, exit codes.

A job is a config class and a function. ``main`` turns the command line into the config, opens the
run directory, calls the function, and turns every error of ours into one line and an exit code.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Generic, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from actors.metrics import MetricsPage, MetricsRecorder, each_of, ray_gauge
from actors.session import Session, SessionConfig
from raysys import machine
from raysys.config import load_config
from raysys.credentials import concealed
from raysys.errors import ConfigError, InterruptedRunError, RaysysError
from raysys.runs import RunDirectory
from raysys.runs.manifest import Status

ConfigT = TypeVar("ConfigT")
Advance = Callable[[float], None]
LOG_WIDTH = 130


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What a job prints at its end.

    Args:
        lines: the result in words.
        report: name of the report inside the run directory, when there is one.
        exit_code: non-zero when the job ran but did not reach its aim.
    """

    lines: Sequence[str] = ()
    report: str | None = None
    exit_code: int = 0


def make_console() -> Console:
    """A console on standard error; wide enough for tables where the width is not a terminal's."""
    console = Console(stderr=True)
    return console if console.is_terminal else Console(stderr=True, width=LOG_WIDTH)


class JobContext:
    """What a running job may use.

    Attributes:
        run: the run directory.
        metrics: records for Prometheus (once Ray runs, or with --metrics) and in the run's Parquet.
        console: where people read (standard error, so that standard output stays for data).
        resumed: whether the run directory existed before and work may be found in it.
    """

    def __init__(
        self, run: RunDirectory, session: SessionConfig, *, resumed: bool, page: str | None = None
    ) -> None:
        self.run = run
        self.resumed = resumed
        self.console = make_console()
        self._page = MetricsPage(page) if page else None
        self._gauges = [self._page.gauge] if self._page else []
        self.metrics = MetricsRecorder(run, each_of(self._gauges))
        self._session_config = session
        self._session: Session | None = None

    def ray(self, **changes: Any) -> Session:
        """Start Ray (or join the cluster of ``--address``) on the first call.

        Args:
            changes: fields of :class:`~actors.session.SessionConfig` that this job needs
                otherwise, such as ``num_cpus``; they do not touch the address.
        """
        if self._session is None:
            config = dataclasses.replace(self._session_config, **changes)
            self._session = Session.start(config)
            self.metrics.flush()
            self.metrics = MetricsRecorder(self.run, each_of([*self._gauges, ray_gauge]))
        return self._session

    @contextlib.contextmanager
    def progress(self, text: str, total: float) -> Iterator[Advance]:
        """Show a progress bar while the block runs; call the given function to advance it."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(text, total=total)
            yield lambda amount: bar.advance(task, amount)

    def close(self) -> None:
        """Flush the metrics and leave Ray; may be called twice."""
        self.metrics.flush()
        if self._page is not None:
            self._page.close()
        if self._session is not None:
            self._session.close()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Job(Generic[ConfigT]):
    """A program.

    Args:
        name: as in ``raysys NAME``.
        config: its config dataclass; an integer field ``seed`` is noted in the manifest.
        run: the work.
        description: shown by ``--help``; by default the docstring of the function's module.
        flags: names of config fields that also get a flag of their own (``--profile smoke``).
    """

    name: str
    config: type[ConfigT]
    run: Callable[[ConfigT, JobContext], Summary]
    description: str = ""
    flags: Sequence[str] = ()


def main(job: Job[Any], arguments: Sequence[str] | None = None) -> int:
    """Run a job from the command line and return its exit code."""
    machine.set_thread_environment()
    parser = _parser(job)
    options = parser.parse_args(arguments)
    with _signals():
        try:
            return _run(job, options)
        except RaysysError as error:
            _complain(error)
            return error.exit_code


def _run(job: Job[Any], options: argparse.Namespace) -> int:
    overrides = [
        f"{name}={getattr(options, name)}"
        for name in job.flags
        if getattr(options, name) is not None
    ]
    overrides += options.set
    run, config, resumed = _open_run(job, options, overrides)
    session = SessionConfig(address=options.address)
    context = JobContext(run, session, resumed=resumed, page=options.metrics)
    status: Status = "failed"
    problem: str | None = None
    try:
        summary = job.run(config, context)
        status = "finished"
    except InterruptedRunError as error:
        status, problem = "interrupted", str(error)
        raise
    except BaseException as error:
        problem = f"{type(error).__name__}: {error}"
        raise
    finally:
        _finish(context, status, problem)
    _show(summary, run)
    return summary.exit_code


def _open_run(
    job: Job[Any], options: argparse.Namespace, overrides: Sequence[str]
) -> tuple[RunDirectory, Any, bool]:
    if options.resume:
        return _resume(job, options, overrides)
    config = load_config(job.config, options.config, overrides)
    uri = options.run_dir or _default_run_dir(job.name)
    seed = getattr(config, "seed", None)
    seeds = [seed] if isinstance(seed, int) else []
    run = RunDirectory.create(
        uri, job=job.name, config=concealed(config), seeds=seeds, now=now_iso()
    )
    return run, config, False


def _resume(
    job: Job[Any], options: argparse.Namespace, overrides: Sequence[str]
) -> tuple[RunDirectory, Any, bool]:
    if not options.run_dir:
        raise ConfigError("--resume", None, "--run-dir with the run to resume")
    if options.config or overrides:
        raise ConfigError(
            "--resume",
            options.config or list(overrides),
            "no configuration of its own",
            "A resumed run keeps the configuration in its manifest",
        )
    run = RunDirectory.open(options.run_dir)
    if run.manifest.job != job.name:
        raise ConfigError("--resume", run.manifest.job, f"a run of the job {job.name!r}")
    from raysys.config import config_from_dict

    config = config_from_dict(job.config, run.manifest.config)
    run.set_status("running", None)
    return run, config, True


def _finish(context: JobContext, status: Status, problem: str | None) -> None:
    """Close and note the end; a failure here must not hide the job's own error."""
    try:
        context.close()
        context.run.set_status(status, now_iso(), problem)
    except RaysysError as error:
        if status == "finished":
            raise
        _complain(error)


def _show(summary: Summary, run: RunDirectory) -> None:
    for line in summary.lines:
        print(line)
    if summary.report:
        print(f"report: {run.uri.rstrip('/')}/{summary.report}")
    print(f"run: {run.uri}")


def now_iso() -> str:
    """The current time, ISO 8601 with zone."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _default_run_dir(name: str) -> str:
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S-%f")
    return str(Path("runs") / f"{name}-{stamp}")


def _parser(job: Job[Any]) -> argparse.ArgumentParser:
    description = job.description or sys.modules[job.run.__module__].__doc__ or ""
    fields = "\n".join(_field_lines(job.config))
    parser = argparse.ArgumentParser(
        prog=f"raysys {job.name}",
        description=description,
        epilog=f"configuration fields and defaults:\n{fields}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with the configuration")
    parser.add_argument(
        "--set", metavar="a.b=VALUE", action="append", default=[], help="change one field"
    )
    parser.add_argument(
        "--run-dir", metavar="URI", help="where results go (default: runs/NAME-TIME)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run-dir")
    parser.add_argument(
        "--address",
        help="Ray cluster to use: host:port, ray://host:port or auto; by default a private "
        "local Ray, or the cluster that a submitted job runs on",
    )
    parser.add_argument(
        "--metrics",
        metavar="HOST:PORT",
        help="serve metrics to Prometheus there (loopback), for jobs that run without Ray",
    )
    for name in job.flags:
        parser.add_argument(
            f"--{name.replace('_', '-')}", dest=name, help=f"same as --set {name}=..."
        )
    return parser


def _field_lines(cls: type[Any], prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(cls):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if dataclasses.is_dataclass(default) and not isinstance(default, type):
            yield from _field_lines(type(default), f"{prefix}{field.name}.")
        else:
            shown = "required" if default is dataclasses.MISSING else repr(default)
            yield f"  {prefix}{field.name} = {shown}"


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into one :class:`InterruptedRunError`; a second one is ignored.

    The clean-up after the first must not be cut short, or processes would be left behind.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        for known in (signal.SIGINT, signal.SIGTERM):
            signal.signal(known, signal.SIG_IGN)
        raise InterruptedRunError(signal.Signals(number).name)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _complain(error: RaysysError) -> None:
    print(f"raysys: error: {error}", file=sys.stderr, flush=True)
