"""Fit the step-time model of serving from an engine's step log.

The log has one JSON object a line, as docs/andes.md describes: batch, prefill_tokens,
context_tokens, seconds. The result is step_time.yaml in the run directory: the section
`step_time` of the Andes scheduler and of the simulator.

    raysys calibrate --set log=steps.jsonl
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from jobs.launcher import Job, JobContext, Summary, main
from raysys.config import check, check_range
from raysys.errors import DataError, StorageError
from raysys.serving.andes.models import StepTime, fit_step_time
from raysys.serving.andes.snapshot import FloatArray

COLUMNS = ("batch", "prefill_tokens", "context_tokens", "seconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrateConfig:
    """Options.

    Args:
        log: step log, JSON lines.
        skip: steps left out at the start, while the engine warms up.
        trim: share of the slowest steps left out on top (page faults, other processes).
    """

    log: str = ""
    skip: int = 16
    trim: float = 0.01

    def __post_init__(self) -> None:
        check(self, "log", bool(self.log), "a file", "Say --set log=steps.jsonl")
        check_range(self, "skip", 0)
        check_range(self, "trim", 0.0, 0.5)


def read_step_log(path: Path) -> FloatArray:
    """Read a step log: shape (T, 4), columns batch, prefill tokens, context tokens, seconds.

    A last line that was cut off (the engine was killed while writing) is left out.

    Raises:
        StorageError: the file cannot be read.
        DataError: another line is not a step.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise StorageError(
            str(path), error.strerror or str(error), "Give an existing log"
        ) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            step = json.loads(line)
            row = [float(step[name]) for name in COLUMNS]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            reason = f"line {number} is not a step: {error}"
            raise DataError(str(path), reason, "See the step log in docs/andes.md") from None
        if not all(math.isfinite(value) and value >= 0 for value in row):
            raise DataError(str(path), f"line {number} has a negative or infinite number")
        rows.append(row)
    return np.array(rows, dtype=np.float64).reshape(-1, len(COLUMNS))


def select_steps(steps_TC: FloatArray, skip: int, trim: float) -> FloatArray:
    """Drop the warm-up, and the steps that are slowest *for their size*."""
    kept = steps_TC[skip:]
    if trim == 0.0 or len(kept) < 32:
        return kept
    rough, _ = fit_step_time(*kept.T)
    excess = kept[:, 3] / rough.predict(kept[:, 0], kept[:, 1], kept[:, 2])
    return kept[excess <= np.quantile(excess, 1.0 - trim)]


def held_out_error(steps_TC: FloatArray) -> float:
    """Median relative error on every second step of a fit to the others."""
    fitted, _ = fit_step_time(*steps_TC[0::2].T)
    test = steps_TC[1::2]
    predicted = fitted.predict(test[:, 0], test[:, 1], test[:, 2])
    return float(np.median(np.abs(predicted - test[:, 3]) / test[:, 3]))


def describe(step_time: StepTime, steps_TC: FloatArray, residual: float) -> list[str]:
    """The fit in words."""
    lines = [
        f"step = {1e3 * step_time.base_s:.3g} ms"
        f" + {1e3 * step_time.per_sequence_s:.3g} ms per sequence"
        f" + {1e3 * step_time.per_prefill_token_s:.3g} ms per prefill token"
        f" + {1e6 * step_time.per_context_token_s:.3g} us per context token",
        f"fitted to {len(steps_TC)} steps, relative residual {residual:.1%} (root mean square), "
        f"held-out error {held_out_error(steps_TC):.1%} (median)",
    ]
    for name, column in zip(COLUMNS[:2], (0, 1)):
        if np.ptp(steps_TC[:, column]) == 0:
            lines.append(f"warning: {name} never changes in the log, so its share is a guess")
    return lines


def run(config: CalibrateConfig, context: JobContext) -> Summary:
    steps = select_steps(read_step_log(Path(config.log)), config.skip, config.trim)
    if len(steps) < 16:
        reason = f"holds {len(steps)} usable steps after the first {config.skip}"
        raise DataError(config.log, reason, "Record at least some hundred steps, or lower skip")
    step_time, residual = fit_step_time(*steps.T)
    fields = dataclasses.asdict(step_time)
    text = yaml.safe_dump({"step_time": fields})
    context.run.storage.write("step_time.yaml", text.encode())
    result = {**fields, "steps": len(steps), "residual": residual}
    context.run.write_json("result.json", {**result, "held_out_error": held_out_error(steps)})
    return Summary(lines=describe(step_time, steps, residual), report="step_time.yaml")


JOB = Job(name="calibrate", config=CalibrateConfig, run=run)

if __name__ == "__main__":
    raise SystemExit(main(JOB))
