"""Evaluate a checkpoint on held-out text: quality, sparsity, FLOPs, and decoding speed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from jobs.launcher import Job, JobContext, Summary
from jobs.lte.figures import layer_figure, quality_figure, save_report
from jobs.lte.train import Config as TrainConfig
from raysys.config import check, check_choice, check_range
from raysys.report import Plot, Section, Table
from raysys.training.lte import checkpoint as checkpoints
from raysys.training.lte import flops
from raysys.training.lte.baselines.oracle import KeepLargest, NeuronThreshold, TopExperts
from raysys.training.lte.decoding import greedy, paired_speeds
from raysys.training.lte.evaluation import evaluate
from raysys.training.lte.gating import MODES, Mode, Selector, SparseModel
from raysys.training.lte.inference import to_kernels
from raysys.training.lte.program import TextConfig
from raysys.training.lte.shapes import shape_of
from raysys.training.lte.text import Batch, TokenBlocks

PROMPT_TOKENS, REPEATS = 16, 3
RIVALS: dict[str, Callable[[float], Selector]] = {
    "keep_largest": KeepLargest,  # oracles: they see the true activations
    "expert_oracle": TopExperts,
    "cats": NeuronThreshold,
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """What to evaluate.

    Args:
        model: LTE checkpoint.
        mode: ``hard`` is how the model is served.
        offsets: offsets of the threshold in logits; one row each.
        batch: sequences at a time.
        rivals: methods without training, on the checkpoint's own weights, for the plot of quality
            against sparsity; any of ``RIVALS``.
        rival_sparsities: FFN sparsities at which they are evaluated.
        decode_tokens: greedy tokens whose decoding is timed, dense against the kernel, one
            thread; 0 for none.
    """

    model: str = ""
    mode: Mode = "hard"
    offsets: tuple[float, ...] = (0.0,)
    batch: int = 4
    rivals: tuple[str, ...] = ()
    rival_sparsities: tuple[float, ...] = (0.3, 0.5, 0.7, 0.8)
    decode_tokens: int = 24
    text: TextConfig = dataclasses.field(default_factory=TextConfig)

    def __post_init__(self) -> None:
        check(self, "model", bool(self.model), "an LTE checkpoint")
        check_choice(self, "mode", MODES)
        check_range(self, "batch", 1)
        for name in self.rivals:
            check(self, "rivals", name in RIVALS, f"names out of {', '.join(RIVALS)}")
        inside = all(0.0 < value < 1.0 for value in self.rival_sparsities)
        check(self, "rival_sparsities", inside, "numbers between 0 and 1")
        check(self, "decode_tokens", self.decode_tokens != 1 and self.decode_tokens >= 0,
              "0, or two or more")  # fmt: skip


def run(config: Config, context: JobContext) -> Summary:
    """Evaluate under each offset, and the dense weights as reference."""
    folder = Path(config.model)
    found = checkpoints.load(folder)
    text = TrainConfig(model=config.model, text=config.text).program().text
    train, held_out = text.blocks(folder)
    tests = held_out.all_batches(config.batch, text.held_out or None)
    shape = shape_of(checkpoints.read_config(folder))
    rows = [{"offset": None, **_row(evaluate(found.sparse, tests, mode="dense").as_dict(), shape)}]
    for offset in config.offsets:
        values = evaluate(found.sparse, tests, mode=config.mode, offset=offset).as_dict()
        rows.append({"offset": offset, **_row(values, shape)})
    sample = text_sample(train, config.batch)
    rivals = [
        {"method": name, **_row(_rival(found.sparse, tests, name, wanted, sample), shape)}
        for name in config.rivals
        for wanted in config.rival_sparsities
    ]
    speed = _speed(config, found)
    context.run.write_json("result.json", {"rows": rows, "rivals": rivals, "decoding": speed})
    headers = [
        "threshold offset or method",
        "nats",
        "perplexity",
        "FFN sparsity",
        "GiFLOPs",
        "with head",
    ]
    cells = [[_label(row["offset"]), *_figures(row)] for row in rows]
    cells += [[row["method"], *_figures(row)] for row in rivals]
    layers = {f"offset {row['offset']:g}": row["sparsity_per_layer"] for row in rows[1:]}
    quality = [("LTE", row["sparsity"], row["nll"]) for row in rows]
    quality += [(row["method"], row["sparsity"], row["nll"]) for row in rivals]
    plots = [
        Plot(title="Quality against sparsity", figure=quality_figure(quality),
             caption="Held-out text. LTE: one point per threshold offset, and all experts on. "
             "keep_largest and expert_oracle are oracles: they see the true activations."),
        Plot(title="Sparsity of each layer", caption="Held-out text.",
             figure=layer_figure(layers)),
    ]  # fmt: skip
    section = Section(
        title="Held-out text", tables=[Table(headers=headers, rows=cells)], plots=plots
    )
    save_report(context.run, "LTE evaluation", str(folder), [section])
    return Summary(
        lines=[" | ".join(headers), *[" | ".join(c) for c in cells], *_speed_lines(speed)],
        report="report.html",
    )


def _label(offset: float | None) -> str:
    return "all experts on" if offset is None else f"{offset:g}"


def _figures(row: Mapping[str, Any]) -> list[str]:
    return [
        f"{row['nll']:.4f}", f"{row['perplexity']:.2f}", f"{row['sparsity']:.1%}",
        f"{row['gflops']:.4g}", f"{row['gflops_total']:.4g}",
    ]  # fmt: skip


def text_sample(train: TokenBlocks, batch: int) -> list[Batch]:
    """Training text on which a rival finds its thresholds."""
    return train.all_batches(batch, 8 * batch)


def _rival(
    sparse: SparseModel, tests: list[Batch], name: str, wanted: float, sample: list[Batch]
) -> dict[str, Any]:
    """A method without training at a wanted sparsity; the model is as before afterwards."""
    selectors: list[Selector] = [RIVALS[name](wanted) for _ in sparse.gates]
    sparse.set_selectors(selectors)
    with torch.no_grad():  # thresholds are found at the first call
        sparse.model(**_joined(sample))
    return evaluate(sparse, tests, mode=None).as_dict()


def _joined(batches: list[Batch]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.cat([batch.inputs["input_ids"] for batch in batches])}


def _speed(config: Config, found: checkpoints.Checkpoint) -> dict[str, float] | None:
    """Tokens per second of the dense weights and of the kernel; the checkpoint is used up."""
    model = found.sparse.model
    if not config.decode_tokens or not model.can_generate():  # type: ignore[operator]
        return None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        other = checkpoints.load(Path(config.model))
        other.sparse.close()
        to_kernels(found)
        ids = range(1, 1 + min(PROMPT_TOKENS, found.sparse.model.config.vocab_size - 1))  # type: ignore[union-attr,operator]
        dense, sparse = other.sparse.model.eval(), model.eval()
        for one in (dense, sparse):
            greedy(one, ids, 2)
        return paired_speeds(dense, sparse, ids, config.decode_tokens, REPEATS)
    finally:
        torch.set_num_threads(threads)


def _speed_lines(speed: dict[str, float] | None) -> list[str]:
    if speed is None:
        return []
    return [
        f"decoding, one thread: {speed['tokens_per_s']:.1f} tokens/s, dense "
        f"{speed['dense_tokens_per_s']:.1f}, ratio {speed['speedup']:.2f}"
    ]


def _row(values: dict[str, Any], shape: flops.Shape) -> dict[str, Any]:
    sparsity = values["sparsity"]
    context = len(values["density_by_position"]) or 1
    return {
        **values,
        "gflops": flops.paper(shape, sparsity),
        "gflops_total": flops.total(shape, sparsity, context),
    }


JOB = Job(name="lte eval", config=Config, run=run)
