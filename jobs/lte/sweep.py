"""Train one model per eta on parallel actors and mark the Pareto set of sparsity and quality."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from actors.lte.training import sweep
from jobs.launcher import Job, JobContext, Summary
from jobs.lte.figures import layer_figure, save_report, tradeoff_figure
from jobs.lte.train import Config as TrainConfig
from raysys.config import check, check_range
from raysys.report import Plot, Section, Table
from raysys.training.lte.config import StageConfig
from raysys.training.lte.pareto import mark_pareto
from raysys.training.lte.program import TextConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The sweep.

    Args:
        model: LTE checkpoint of stage 0.
        out: folder for the models, one sub-folder per eta.
        etas: efficiency coefficients.
        stage2_steps: optimiser steps of stage 2.
        parallel: actors at a time, one core each.
        stop_margin: a point that is this many nats behind a sparser one after stage 1 stops there;
            a large margin trains all to the end.
    """

    model: str = ""
    out: str = "lte-sweep"
    etas: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    stage2_steps: int = 100
    parallel: int = 2
    stop_margin: float = 0.1
    text: TextConfig = dataclasses.field(default_factory=TextConfig)
    stage: StageConfig = dataclasses.field(default_factory=StageConfig)

    def __post_init__(self) -> None:
        check(self, "etas", len(self.etas) > 0, "one or more numbers")
        check_range(self, "stage2_steps", 1)
        check_range(self, "parallel", 1)
        check_range(self, "stop_margin", 0)


def run(config: Config, context: JobContext) -> Summary:
    """Train all points; rows, models and a report."""
    context.ray(num_cpus=config.parallel)
    base = TrainConfig(
        model=config.model, text=config.text, stage=dataclasses.replace(config.stage, stage=1)
    ).program()
    found = sweep(
        base, config.etas, Path(config.out).absolute(), stage2_steps=config.stage2_steps,
        parallel=config.parallel, stop_margin=config.stop_margin,
    )  # fmt: skip
    rows = mark_pareto(found)
    context.run.write_json("result.json", {"rows": rows})
    headers = ["eta", "FFN sparsity", "nats", "perplexity", "Pareto"]
    cells = [
        [f"{row['eta']:g}", f"{row['sparsity']:.1%}", f"{row['nll']:.4f}",
         f"{row['perplexity']:.2f}",
         "stopped" if row["stopped"] else "yes" if row["pareto"] else ""]
        for row in rows
    ]  # fmt: skip
    points = [(f"eta {row['eta']:g}", row["sparsity"], row["nll"]) for row in rows]
    layers = {f"eta {row['eta']:g}": row["sparsity_per_layer"] for row in rows}
    section = Section(
        title="Pareto table",
        tables=[Table(headers=headers, rows=cells)],
        plots=[
            Plot(title="Quality against sparsity", caption="Held-out text; one model per point.",
                 figure=tradeoff_figure(points)),
            Plot(title="Sparsity of each layer", caption="Layers compete for one budget.",
                 figure=layer_figure(layers)),
        ],
    )  # fmt: skip
    save_report(context.run, "LTE sweep", "Quality against sparsity over eta", [section])
    return Summary(
        lines=[" | ".join(headers), *[" | ".join(c) for c in cells]], report="report.html"
    )


JOB = Job(name="lte sweep", config=Config, run=run)
