"""Train one stage of LTE on Ray Train; ``--resume`` with the same run directory goes on exactly."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.lte.progress import following, steps_done
from actors.lte.training import fit, log_path
from jobs.launcher import Advance, Job, JobContext, Summary
from jobs.lte.convert import source_folder
from jobs.lte.figures import curve_figure, layer_figure, save_report
from raysys import machine
from raysys.config import check, check_range
from raysys.report import Plot, Section
from raysys.training.lte.config import StageConfig
from raysys.training.lte.program import ProgramConfig, TextConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """One stage; see ``raysys/training/lte/program.py`` and ``config.py`` for the fields.

    Args:
        model: LTE checkpoint (a dense folder for stage 0).
        out: folder of the trained checkpoint.
        teacher: dense folder to distil from; ``packaged`` is SmolLM2-135M-Instruct.
        workers: data-parallel workers of Ray Train.
        shard: spread weights, gradients and optimiser states over the workers (FSDP2).
    """

    model: str = ""
    out: str = ""
    teacher: str = ""
    workers: int = 1
    text: TextConfig = dataclasses.field(default_factory=TextConfig)
    stage: StageConfig = dataclasses.field(default_factory=StageConfig)
    checkpoint_every: int = 50
    evaluate_every: int = 0
    fit: bool = False
    threads: int = 1
    shard: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        check_range(self, "workers", 1, 4096)
        check(self, "shard", not self.shard or self.workers > 1, "false with one worker")

    def program(self) -> ProgramConfig:
        """The stage with absolute paths, as workers need it."""
        teacher = str(source_folder("")) if self.teacher == "packaged" else self.teacher
        folder = self.text.folder
        if self.text.corpus == "shakespeare" and not folder:
            folder = str(machine.data_dir() or "")
        return ProgramConfig(
            model=str(Path(self.model).absolute()) if self.model else str(source_folder("")),
            out=str(Path(self.out).absolute()) if self.out else "",
            teacher=str(Path(teacher).absolute()) if teacher else "",
            text=dataclasses.replace(self.text, folder=folder and str(Path(folder).absolute())),
            stage=self.stage,
            checkpoint_every=self.checkpoint_every,
            evaluate_every=self.evaluate_every,
            fit=self.fit,
            threads=self.threads,
            shard=self.shard,
            force=self.force,
        )


def run(config: Config, context: JobContext) -> Summary:
    """Train; Ray Train keeps its states in the run directory."""
    program = config.program()
    context.ray(num_cpus=max(2, config.workers + 1))
    storage = str(Path(context.run.uri).absolute() / "ray-train")
    steps = config.stage.steps
    with (
        context.progress("training steps", total=steps) as advance,
        following(log_path(storage, "stage"), _Teller(steps, advance, context.console)),
    ):
        result = fit(program, storage, "stage", workers=config.workers)
    context.run.write_json("result.json", result)
    context.run.append_rows("curve", [_flat(row) for row in result["curve"]])
    save_report(context.run, "LTE training", "One stage of LTE", _sections(config, result))
    lines = [
        f"stage {config.stage.stage}: {result['nll']:.4f} nats, perplexity "
        f"{result['perplexity']:.2f}, FFN sparsity {result['sparsity']:.1%} on held-out text",
        f"checkpoint: {program.out or 'not written (no out)'}",
    ]
    return Summary(lines=lines, report="report.html")


class _Teller:
    """Shows a training's rows: the bar, and a line now and then for who reads a log."""

    def __init__(self, steps: int, advance: Advance, console: Console) -> None:
        self._steps, self._advance, self._console = steps, advance, console
        self._shown = 0
        self._every = max(1, steps // 20)

    def __call__(self, row: dict[str, Any]) -> None:
        done, sparsity = steps_done(row), row.get("sparsity", 0.0)
        self._advance(done - self._shown)
        self._shown = done
        if "perplexity" in row:
            self._say(done, f"held-out perplexity {row['perplexity']:.2f}", sparsity)
        elif done % self._every == 0:
            self._say(done, f"training loss {row['loss']:.4f}", sparsity)

    def _say(self, step: int, figure: str, sparsity: float) -> None:
        self._console.print(
            f"step {step} of {self._steps}: {figure}, FFN sparsity {sparsity:.1%}", highlight=False
        )


def _sections(config: Config, result: dict[str, Any]) -> list[Section]:
    return [
        Section(
            title="Held-out text",
            lead=f"Stage {config.stage.stage}, {config.stage.steps} steps.",
            plots=[
                Plot(
                    title="Perplexity and sparsity over training",
                    caption="Held-out text, hard selection." + _landed(result["landing_offset"]),
                    figure=curve_figure(result["curve"]),
                ),
                Plot(
                    title="Sparsity of each layer",
                    caption="Share of experts that are off.",
                    figure=layer_figure({"this model": result["sparsity_per_layer"]}),
                ),
            ],
        )
    ]


def _landed(offset: float) -> str:
    if not offset:
        return ""
    return f" The last point: after all thresholds moved by {offset:+.3f} to the target sparsity."


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    return {key: float(value) for key, value in row.items() if isinstance(value, (int, float))}


JOB = Job(name="lte train", config=Config, run=run)
