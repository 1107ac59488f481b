"""Evaluate a checkpoint on held-out text: quality, sparsity, FLOPs, and decoding speed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jobs.launcher import Job, JobContext, Summary
from jobs.lte.figures import layer_figure, save_report
from jobs.lte.train import Config as TrainConfig
from raysys.config import check, check_choice, check_range
from raysys.report import Plot, Section, Table
from raysys.training.lte import checkpoint as checkpoints
from raysys.training.lte import flops
from raysys.training.lte.evaluation import evaluate
from raysys.training.lte.gating import MODES, Mode
from raysys.training.lte.program import TextConfig
from raysys.training.lte.shapes import shape_of


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """What to evaluate.

    Args:
        model: LTE checkpoint.
        mode: ``hard`` is how the model is served.
        offsets: offsets of the threshold in logits; one row each.
        batch: sequences at a time.
    """

    model: str = ""
    mode: Mode = "hard"
    offsets: tuple[float, ...] = (0.0,)
    batch: int = 4
    text: TextConfig = dataclasses.field(default_factory=TextConfig)

    def __post_init__(self) -> None:
        check(self, "model", bool(self.model), "an LTE checkpoint")
        check_choice(self, "mode", MODES)
        check_range(self, "batch", 1)


def run(config: Config, context: JobContext) -> Summary:
    """Evaluate under each offset, and the dense weights as reference."""
    folder = Path(config.model)
    found = checkpoints.load(folder)
    text = TrainConfig(model=config.model, text=config.text).program().text
    _, held_out = text.blocks(folder)
    tests = held_out.all_batches(config.batch, text.held_out or None)
    shape = shape_of(checkpoints.read_config(folder))
    rows = [{"offset": None, **_row(evaluate(found.sparse, tests, mode="dense").as_dict(), shape)}]
    for offset in config.offsets:
        values = evaluate(found.sparse, tests, mode=config.mode, offset=offset).as_dict()
        rows.append({"offset": offset, **_row(values, shape)})
    context.run.write_json("result.json", {"rows": rows})
    headers = ["threshold offset", "nats", "perplexity", "FFN sparsity", "GiFLOPs", "with head"]
    cells = [
        ["all experts on" if row["offset"] is None else f"{row['offset']:g}", f"{row['nll']:.4f}",
         f"{row['perplexity']:.2f}", f"{row['sparsity']:.1%}", f"{row['gflops']:.4f}",
         f"{row['gflops_total']:.4f}"]
        for row in rows
    ]  # fmt: skip
    layers = {f"offset {row['offset']:g}": row["sparsity_per_layer"] for row in rows[1:]}
    plot = Plot(
        title="Sparsity of each layer", caption="Held-out text.", figure=layer_figure(layers)
    )
    section = Section(
        title="Held-out text", tables=[Table(headers=headers, rows=cells)], plots=[plot]
    )
    save_report(context.run, "LTE evaluation", str(folder), [section])
    return Summary(
        lines=[" | ".join(headers), *[" | ".join(c) for c in cells]], report="report.html"
    )


def _row(values: dict[str, Any], shape: flops.Shape) -> dict[str, Any]:
    sparsity = values["sparsity"]
    context = len(values["density_by_position"]) or 1
    return {
        **values,
        "gflops": flops.paper(shape, sparsity),
        "gflops_total": flops.total(shape, sparsity, context),
    }


JOB = Job(name="lte eval", config=Config, run=run)
