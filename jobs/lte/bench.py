"""Time LTE's FFN kernel against torch's dense FFN on this machine, by sparsity and batch."""

from __future__ import annotations

import dataclasses

import torch

from jobs.bench.lte.kernels import Layer
from jobs.launcher import Job, JobContext, Summary
from jobs.lte.figures import latency_figure, save_report
from raysys.config import check_choice, check_range
from raysys.ops.lte_native import ISAS, best_isa
from raysys.report import Plot, Section, Table


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """What to time.

    Args:
        hidden, neurons: of one gated FFN; neurons in experts of 32.
        dtype: float32 or bfloat16.
        batches: tokens at a time.
        sparsities: shares of experts that are off.
        threads: of both sides.
        repeats: interleaved repeats per case.
    """

    hidden: int = 576
    neurons: int = 1536
    dtype: str = "bfloat16"
    batches: tuple[int, ...] = (1, 8, 32)
    sparsities: tuple[float, ...] = (0.0, 0.5, 0.8, 0.9)
    threads: int = 1
    repeats: int = 5

    def __post_init__(self) -> None:
        check_choice(self, "dtype", ("float32", "bfloat16"))
        for field in ("hidden", "neurons", "threads", "repeats"):
            check_range(self, field, 1)


def run(config: Config, context: JobContext) -> Summary:
    """Time every case; a table and a plot."""
    torch.set_num_threads(config.threads)
    layer = Layer((config.hidden, config.neurons), getattr(torch, config.dtype))
    rows = [
        layer.ratio(tokens, sparsity, config.repeats)
        for tokens in config.batches
        for sparsity in config.sparsities
    ]
    context.run.write_json("result.json", {"rows": rows, "isa": ISAS[best_isa()]})
    headers = ["tokens", "sparsity", "dense µs", "LTE µs", "speed-up"]
    cells = [
        [str(r["tokens"]), f"{r['sparsity']:.0%}", f"{r['dense_us']:.0f}", f"{r['sparse_us']:.0f}",
         f"{r['speedup']:.2f}"]
        for r in rows
    ]  # fmt: skip
    caption = f"{ISAS[best_isa()]}, {config.threads} thread(s), router included."
    plot = Plot(title="Latency against sparsity", caption=caption, figure=latency_figure(rows))
    section = Section(title="FFN", tables=[Table(headers=headers, rows=cells)], plots=[plot])
    save_report(
        context.run, "LTE kernel", f"{config.hidden} x {config.neurons} {config.dtype}", [section]
    )
    return Summary(
        lines=[" | ".join(headers), *[" | ".join(c) for c in cells]], report="report.html"
    )


JOB = Job(name="lte bench", config=Config, run=run)
