"""A job as a process of its own: run undisturbed, then under blows, and compared with itself.

The moment of a blow counts from the first sign of work (a checkpoint, a worker) after the job's
last start: an undisturbed run says how long the work takes, and each of n blows falls somewhere in
the next n-th part of it. A killed driver is started again with ``--resume``.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jobs.bench.faults import processes
from jobs.bench.faults.plan import Blow, Tally, draw_blows
from raysys import machine
from raysys.errors import RemoteError

DRIVER = "driver"
LIMIT_S = 900.0
_ABSENT_S = 30.0
_GONE_S = 20.0
Sign = Callable[[Path, int, float], bool]


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A job that must survive.

    Args:
        system: name of the claim.
        words: after ``python -m``: the module, and the command where it has several.
        settings: for ``--set``, given the folder of the trial.
        victims: title patterns of what may be killed, by kind; the driver needs none.
        sign: whether work is under way, given run directory, process id and start time (epoch s).
        digest: of the result, given the folder of the trial.
    """

    system: str
    words: Sequence[str]
    settings: Callable[[Path], Sequence[str]]
    victims: Mapping[str, str]
    sign: Sign
    digest: Callable[[Path], str]

    def kinds(self) -> list[str]:
        """What may be killed."""
        return [DRIVER, *self.victims]


def newer_file(pattern: str) -> Sign:
    """Work is under way once a file or folder of the run directory is newer than the start."""

    def seen(run: Path, pid: int, started_s: float) -> bool:
        try:
            return any(path.stat().st_mtime > started_s for path in run.glob(pattern))
        except FileNotFoundError:  # pruned between listing and looking
            return False

    return seen


def titled(pattern: str) -> Sign:
    """Work is under way once a process of that title lives."""
    return lambda run, pid, started_s: bool(processes.matching(processes.tree(pid), pattern))


@dataclass(slots=True)
class _Run:
    """One trial: the process that is its driver now."""

    program: Program
    folder: Path
    resumes: int = 0
    started_s: float = 0.0
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        self._start(resume=False)

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def _start(self, *, resume: bool) -> None:
        words = [sys.executable, "-m", *self.program.words, "--run-dir", str(self.run_dir)]
        if resume:
            words.append("--resume")
        else:
            words += [w for s in self.program.settings(self.folder) for w in ("--set", s)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        environment.pop("RAY_ADDRESS", None)
        self.started_s = time.time()
        with (self.folder / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(
                words, cwd=machine.app_root(), env=environment, stdout=log, stderr=log
            )

    def wait_for_work(self) -> bool:
        """False where the program ended first."""
        while self.process.poll() is None:
            if self.program.sign(self.run_dir, self.process.pid, self.started_s):
                return True
            self._check_limit()
            time.sleep(processes.POLL_S)
        return False

    def wait(self, seconds: float) -> bool:
        """Whether it still runs after so long."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        return False

    def end(self) -> int:
        """Wait for the end; the exit code."""
        while self.wait(1.0):
            self._check_limit()
        return self.process.returncode

    def kill_driver(self) -> int:
        """Kill and start again; how many descendants outlived it by too long."""
        family = list(processes.tree(self.process.pid))
        self.process.kill()
        self.process.wait()
        orphans = processes.wait_gone(family, _GONE_S)
        self.resumes += 1
        self._start(resume=True)
        return orphans

    def stop(self) -> None:
        """End what is left of the trial."""
        family = list(processes.tree(self.process.pid))
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        processes.wait_gone(family, _GONE_S)

    def _check_limit(self) -> None:
        if time.time() - self.started_s > LIMIT_S:
            words = " ".join(self.program.words)
            raise RemoteError(words, f"did not end in {LIMIT_S:.0f} s", "See its log")

    def tail(self) -> str:
        """The last lines of the log."""
        return (self.folder / "log.txt").read_text(errors="replace")[-600:]


def undisturbed(program: Program, folder: Path) -> tuple[str, float]:
    """Digest of the result of a run without kills, and how long its work took, in s.

    Raises:
        RemoteError: it failed.
    """
    run = _Run(program, folder)
    try:
        run.wait_for_work()
        begun_s = time.monotonic()
        code = run.end()
        if code:
            raise RemoteError(" ".join(program.words), f"exit code {code}: {run.tail()}", "")
        return program.digest(folder), time.monotonic() - begun_s
    finally:
        run.stop()


def disturb(
    program: Program, folder: Path, blows: Sequence[Blow], expected: str, work_s: float,
    rng: random.Random, tally: Tally,
) -> None:  # fmt: skip
    """One trial under blows, put into the books."""
    run = _Run(program, folder)
    killed: Counter[str] = Counter()
    orphans = 0
    try:
        for blow in blows:
            alive = run.wait_for_work() and run.wait(blow.moment * work_s / len(blows))
            if alive and blow.victim == DRIVER:
                orphans += run.kill_driver()
                killed[DRIVER] += 1
            elif alive and processes.kill_one(
                run.process.pid, program.victims[blow.victim], rng, _ABSENT_S
            ):
                killed[blow.victim] += 1
            elif run.process.poll() is None:
                tally.absent[blow.victim] += 1
            else:
                tally.late[blow.victim] += 1
        code = run.end()
        equal = code == 0 and program.digest(folder) == expected
        row = {
            "kills": dict(killed), "exit_code": code, "equal": equal, "held": equal,
            "resumes": run.resumes, "orphans": orphans,
        }  # fmt: skip
        tally.trials.append(row if equal else {**row, "log": run.tail()})
        tally.kills += killed
    finally:
        run.stop()


def shoot(program: Program, folder: Path, seed: int, trials: int, each: int) -> Tally:
    """Run once undisturbed, then ``trials`` times under ``each`` blows.

    Where already the undisturbed run fails nothing counts, so the share is 0.0, and the books say
    why; other claims go on.
    """
    tally = Tally()
    try:
        expected, work_s = undisturbed(program, folder / "undisturbed")
    except RemoteError as error:
        tally.trials.append({"kills": {}, "held": False, "undisturbed": str(error)})
        return tally
    blows = draw_blows(seed, program.system, program.kinds(), trials * each)
    rng = random.Random(f"{seed}:{program.system}:which")
    for trial in range(trials):
        mine = blows[trial * each : (trial + 1) * each]
        disturb(program, folder / f"trial-{trial}", mine, expected, work_s, rng, tally)
    return tally
