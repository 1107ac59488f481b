"""Tour: a small language model that learns which of its neurons a token needs."""

from __future__ import annotations

import torch

from jobs.bench.lte.kernels import SMALL, Layer
from jobs.bench.lte.quality import QUICK, text
from jobs.lte.figures import latency_figure, layer_figure, tradeoff_figure
from jobs.tour.stage import Row, Stage, StageContext, StageResult
from raysys.ops.lte_native import ISAS, best_isa
from raysys.report import Plot
from raysys.training.lte.contest import Contest
from raysys.training.lte.contest_config import ContestConfig
from raysys.training.lte.text import TokenBlocks, to_bytes

METHODS = {
    "dense_tuned": "dense, tuned equally long",
    "lte": "LTE",
    "random_router": "random router",
    "noisy_top_k": "noisy top-k router",
    "cats": "CATS",
    "wanda": "Wanda",
}
SMOKE = ContestConfig(hidden=32, neurons=64, layers=2, heads=2, expert_size=8, length=32,
                      base_steps=20, steps=20, held_out=8)  # fmt: skip


def run(context: StageContext) -> StageResult:
    """Train a small model and its sparse rivals on one core, then time the kernel."""
    torch.set_num_threads(1)
    config = SMOKE if context.smoke else QUICK
    source = text()
    train, held_out = (
        TokenBlocks.encode(part, to_bytes, config.length)
        for part in (source.train, source.held_out)
    )
    total = config.base_steps + config.steps * 4
    seen = [0]

    def advance(_: object) -> None:
        seen[0] += 1
        context.progress(seen[0], total, "training")

    base = Contest.train_base(config, train, context.seed, advance)
    contest = Contest(config, train, held_out, base, context.seed, advance)
    rows = {name: contest.run(name) for name in METHODS}
    speeds = _speeds(context)
    return StageResult(rows=_rows(rows, speeds), plots=_plots(rows, speeds), notes=[
        f"{source.name} text, bytes; a model of {config.layers} layers trained for "
        f"{config.base_steps} steps, then {config.steps} steps per method: a tiny budget, so the "
        "differences are small and one seed decides them",
        f"the kernel ran as {ISAS[best_isa()]} on one thread, bfloat16, {SMALL[0]} x {SMALL[1]} "
        "(SmolLM2's FFN), router included, weights random",
    ])  # fmt: skip


def _speeds(context: StageContext) -> list[dict[str, float]]:
    layer = Layer(SMALL, torch.bfloat16)
    sparsities = (0.5, 0.8) if context.smoke else (0.0, 0.3, 0.5, 0.65, 0.8, 0.9)
    return [layer.ratio(t, s, 3) for t in (1, 8) for s in sparsities]


def _rows(rows: dict[str, dict[str, object]], speeds: list[dict[str, float]]) -> list[Row]:
    ours = rows["lte"]
    found = [
        Row(measure=f"held-out nats per byte, {ours['sparsity']:.0%} of the FFN off", unit="nats",
            better="lower", baseline_name=METHODS[name], baseline=rows[name]["nll"],  # type: ignore[arg-type]
            ours=ours["nll"])  # type: ignore[arg-type]
        for name in ("dense_tuned", "noisy_top_k", "random_router", "cats", "wanda")
    ]  # fmt: skip
    for row in speeds:
        if round(row["sparsity"], 1) in (0.5, 0.8):
            measure = f"FFN time, {row['tokens']} token(s), {row['sparsity']:.0%} off"
            found.append(
                Row(measure=measure, unit="µs", better="lower", baseline_name="torch dense",
                    baseline=row["dense_us"], ours=row["sparse_us"])
            )  # fmt: skip
    return found


def _plots(rows: dict[str, dict[str, object]], speeds: list[dict[str, float]]) -> list[Plot]:
    points = [(METHODS[n], r["sparsity"], r["nll"]) for n, r in rows.items()]
    return [
        Plot(title="Quality against sparsity", figure=tradeoff_figure(points),  # type: ignore[arg-type]
             caption="Every method went on from one dense model for as many steps."),
        Plot(title="Sparsity of each layer", caption="Layers compete for one budget.",
             figure=layer_figure({"LTE": rows["lte"]["sparsity_per_layer"]})),  # type: ignore[dict-item]
        Plot(title="Latency against sparsity", figure=latency_figure(speeds),
             caption="The FFN kernel against torch's dense FFN, router included."),
    ]  # fmt: skip


STAGE = Stage(
    name="lte",
    title="Language models that learn to be efficient",
    problem="For one token most neurons of a language model hardly matter, but a plain model does "
    "not know which. Train routers with the model to need few groups of neurons; skip the rest.",
    command="raysys lte convert --set out=lte; raysys lte train --set model=lte --set out=lte-1",
    run=run,
)
