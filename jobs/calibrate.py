"""Measure this machine's serving engine: fit the step time that planner and simulator use.

Without a log, an engine with the packaged model is started and loaded with bursts of growing size;
its step log (docs/andes.md: batch, prefill_tokens, context_tokens, seconds, one JSON object a line)
is kept in the run directory as steps.jsonl and fitted. With a log of your own engine that is
fitted, and no engine is started.

The result is step_time.yaml in the run directory: the section `step_time` of the Andes scheduler
and of the simulator.

    raysys calibrate serving
    raysys calibrate serving --set log=steps.jsonl
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from actors.andes.engine_settings import AndesEngineConfig, idle_status
from jobs.launcher import Job, JobContext, Summary, main
from raysys import scratch
from raysys.config import check, check_range
from raysys.errors import DataError, StorageError
from raysys.serving.andes.models import StepTime, fit_step_time
from raysys.serving.andes.snapshot import FloatArray
from raysys.serving.prompts import PROMPTS

COLUMNS = ("batch", "prefill_tokens", "context_tokens", "seconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrateConfig:
    """Options.

    Args:
        log: step log, JSON lines; empty measures an engine.
        bursts: sizes of the bursts that the engine gets, one after the other.
        tokens: answer length in those bursts.
        skip: steps left out at the start, while the engine warms up.
        trim: share of the slowest steps left out on top (page faults, other processes).
    """

    log: str = ""
    bursts: tuple[int, ...] = (1, 2, 4, 8, 16, 16)
    tokens: int = 48
    skip: int = 16
    trim: float = 0.01

    def __post_init__(self) -> None:
        check(self, "bursts", bool(self.bursts) and min(self.bursts) >= 1, "sizes of at least 1")
        check_range(self, "tokens", 2, 100_000)
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


def measure_engine(config: CalibrateConfig, context: JobContext) -> bytes:
    """Load an engine on this machine and return its step log.

    Raises:
        CapabilityError: vLLM or the packaged model is not installed.
        RemoteError: the engine failed, or its scheduler tells nothing.
    """
    from actors.serving.client import Chat, ChatClient, require_complete
    from actors.serving.config import ServingConfig
    from actors.serving.endpoint import Endpoint, free_port

    context.ray(num_cpus=2)
    with scratch.folder("calibrate") as folder:
        status, log = folder / "status.json", folder / "steps.jsonl"
        andes = AndesEngineConfig(status_file=str(status), step_log=str(log))
        endpoint = ServingConfig(port=free_port(), andes=andes)
        tell = context.console.print
        with Endpoint.start(endpoint, report=lambda text: tell(f"{text} ...")):
            client = ChatClient(endpoint.url, endpoint.model.name)
            with context.progress("bursts", total=len(config.bursts)) as advance:
                for size in config.bursts:
                    chats = [
                        Chat(prompt=prompt, max_tokens=config.tokens, exact_length=True)
                        for prompt in (PROMPTS * size)[:size]
                    ]
                    require_complete(client.burst(chats))
                    advance(1)
            idle_status(status)  # the engine has flushed its log
            return log.read_bytes()


def formula(step_time: StepTime) -> str:
    """The step time in words."""
    return (
        f"step = {1e3 * step_time.base_s:.3g} ms"
        f" + {1e3 * step_time.per_sequence_s:.3g} ms per sequence"
        f" + {1e3 * step_time.per_prefill_token_s:.3g} ms per prefill token"
        f" + {1e6 * step_time.per_context_token_s:.3g} us per context token"
    )


def fit_log(config: CalibrateConfig, log: Path) -> tuple[StepTime, dict[str, Any], list[str]]:
    """Fit a log: coefficients, figures for the result, and lines to print."""
    steps = select_steps(read_step_log(log), config.skip, config.trim)
    if len(steps) < 16:
        reason = f"holds {len(steps)} usable steps after the first {config.skip}"
        raise DataError(str(log), reason, "Record at least some hundred steps, or lower skip")
    step_time, residual = fit_step_time(*steps.T)
    error = held_out_error(steps)
    lines = [
        f"fitted to {len(steps)} steps, relative residual {residual:.1%} (root mean square), "
        f"held-out error {error:.1%} (median)"
    ]
    for column, name in enumerate(COLUMNS[:2]):
        if np.ptp(steps[:, column]) == 0:
            lines.append(f"warning: {name} never changes in the log, so its share is a guess")
    return step_time, {"steps": len(steps), "residual": residual, "held_out_error": error}, lines


def run(config: CalibrateConfig, context: JobContext) -> Summary:
    if config.log:
        step_time, figures, lines = fit_log(config, Path(config.log))
    else:
        content = measure_engine(config, context)
        context.run.storage.write("steps.jsonl", content)
        with scratch.folder("calibrate") as folder:
            log = folder / "steps.jsonl"
            log.write_bytes(content)
            step_time, figures, lines = fit_log(config, log)
    fields = dataclasses.asdict(step_time)
    text = yaml.safe_dump({"step_time": fields})
    context.run.storage.write("step_time.yaml", text.encode())
    context.run.write_json("result.json", {**fields, **figures})
    return Summary(lines=[formula(step_time), *lines], report="step_time.yaml")


def words(arguments: Sequence[str]) -> list[str]:
    """The arguments without what is calibrated: so far there is only ``serving``."""
    return list(arguments[1:] if arguments[:1] == ["serving"] else arguments)


JOB = Job(name="calibrate", config=CalibrateConfig, run=run)

if __name__ == "__main__":
    raise SystemExit(main(JOB, words(sys.argv[1:])))
