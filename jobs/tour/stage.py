"""What a stage of the tour is and what it returns."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

from actors.session import Session
from raysys.bench import Better
from raysys.errors import ConfigError
from raysys.report import Plot
from raysys.runs import RunDirectory

Profile = Literal["standard", "smoke"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the tour's table: a measure, its baseline, ours."""

    measure: str
    unit: str
    better: Better
    baseline_name: str
    baseline: float
    ours: float

    def __post_init__(self) -> None:
        for field in ("baseline", "ours"):
            if not math.isfinite(getattr(self, field)):
                raise ConfigError(field, getattr(self, field), "a finite number", self.measure)

    @property
    def ratio(self) -> float | None:
        """Ours over the baseline; None when the baseline is zero."""
        return self.ours / self.baseline if self.baseline else None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StageResult:
    """What a stage measured, for the table and the report.

    Args:
        rows: all figures, at least one.
        headline: index of the row that stands for the stage on top of the page.
    """

    rows: Sequence[Row]
    plots: Sequence[Plot] = ()
    notes: Sequence[str] = ()
    headline: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.headline < len(self.rows):
            raise ConfigError("headline", self.headline, f"an index of {len(self.rows)} rows")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StageContext:
    """What a stage may use.

    Args:
        profile: ``"standard"``, or ``"smoke"`` for a few seconds of work.
        seed: seed of everything random.
        session: the running Ray.
        run: the run directory; a stage's own files go under its name.
        progress: ``progress(done, total, text)`` moves the stage's bar.
    """

    profile: Profile
    seed: int
    session: Session
    run: RunDirectory
    progress: Callable[[float, float, str], None]

    @property
    def smoke(self) -> bool:
        return self.profile == "smoke"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A demonstration of one system.

    Args:
        name: short name, unique; also the module's name.
        title: name for people.
        problem: the problem that it solves, in one or two sentences.
        command: how to run the system for real.
        run: does the work; raises ``CapabilityError`` where the machine lacks something.
    """

    name: str
    title: str
    problem: str
    command: str
    run: Callable[[StageContext], StageResult]
