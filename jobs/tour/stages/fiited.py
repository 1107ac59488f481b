"""FIITED: embedding rows that get the length that they deserve, under a tenth of the weights."""

from __future__ import annotations

from dataclasses import replace

import torch

from jobs.bench.fiited.quality import BASE, DIM
from jobs.tour.stage import Row, Stage, StageContext, StageResult
from raysys.report import Plot, new_figure
from raysys.training.fiited.baselines import Embedding, build
from raysys.training.fiited.metrics import statistics
from raysys.training.fiited.models import DLRM
from raysys.training.fiited.progressive import Record, run
from raysys.training.fiited.stream import PlantedStream, StreamConfig

RATIO = 0.9
METHODS = {"full width": "full", "FIITED": "chunks", "whole rows": "rows", "hashing": "hashing"}
LATE = (0.8, 1.0)
WINDOWS = 20


def train(context: StageContext) -> StageResult:
    """Four ways to hold the same tables, trained over the same drifting stream of clicks."""
    torch.set_num_threads(1)
    config = _stream(context)
    found: dict[str, tuple[Record, Embedding]] = {}
    for index, (name, method) in enumerate(METHODS.items()):
        context.progress(index, len(METHODS), f"training with {name}")
        torch.manual_seed(context.seed)
        embedding = build(method, config.rows, DIM, RATIO, replace(BASE, seed=context.seed))
        model = DLRM(len(config.rows), embedding.width)
        found[name] = run(PlantedStream(config), embedding, model), embedding
    context.progress(len(METHODS), len(METHODS), "done")
    ours = found["FIITED"]
    rows = [
        Row(
            measure=f"AUC late in the stream, {_weights(name)}", unit="AUC", better="higher",
            baseline_name=name, baseline=record.auc(*LATE), ours=ours[0].auc(*LATE),
        )
        for name, (record, _) in found.items()
        if name != "FIITED"
    ]  # fmt: skip
    full = found["full width"][1]
    rows.append(
        Row(
            measure="bytes held, index included", unit="MB", better="lower",
            baseline_name="full width", baseline=full.bytes() / 1e6, ours=ours[1].bytes() / 1e6,
        )
    )  # fmt: skip
    stats = statistics(ours[1].bag(0).store)
    return StageResult(
        rows=rows,
        plots=[_drift_plot({name: record for name, (record, _) in found.items()}, config)],
        notes=[
            f"{sum(config.rows):,} ids in {len(config.rows)} fields; the popular ids change at "
            "half time. All but full width have a tenth of the weights.",
            f"{stats['rows']:,.0f} ids own {stats['alive']:,.0f} chunks of 4 floats. At 16 floats "
            "a row the index is most of the bytes; at 64 floats it is a small part.",
        ],
    )


def _weights(name: str) -> str:
    return "10 % against all weights" if name == "full width" else "10 % of the weights each"


def _stream(context: StageContext) -> StreamConfig:
    rows, steps = (
        ((2000, 1000, 500, 200), 40) if context.smoke else ((20_000, 8_000, 4_000, 500), 240)
    )
    batch = 256 if context.smoke else 1024
    return StreamConfig(
        rows=rows, signal=2.0, batch=batch, steps=steps, swap_at=steps // 2, seed=context.seed
    )


def _drift_plot(records: dict[str, Record], config: StreamConfig) -> Plot:
    figure, axes = new_figure()
    width = config.steps / WINDOWS
    for name, record in records.items():
        curve = [record.auc(i / WINDOWS, (i + 1) / WINDOWS) for i in range(WINDOWS)]
        axes.plot([(i + 0.5) * width for i in range(WINDOWS)], curve, label=name)
    axes.axvline(config.swap_at, linestyle=":", linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("AUC, predicted before training")
    axes.legend()
    return Plot(
        title="Quality along the stream",
        caption="At the dotted line the popular ids change places with unpopular ones.",
        figure=figure,
    )


STAGE = Stage(
    name="fiited",
    title="FIITED: embedding rows of fitting length",
    problem="Every id of a recommendation model gets an equally long vector, although few ids "
    "matter. FIITED moves memory to those that do, while training runs.",
    command="raysys embed train --data clicks.parquet",
    run=train,
)
