"""Train a click model in a stream, predict-then-train, under a hard budget of embedding memory.

raysys embed train --data clicks.parquet [--model deepfm] [--prune 0.95] [--shards 2]
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from jobs.embed.config import TrainConfig
from jobs.embed.network import build_model
from jobs.embed.report import write_report
from jobs.launcher import Job, JobContext, Summary
from raysys.training.fiited import FiitedEmbeddingBag, checkpoint
from raysys.training.fiited.budget import Guard, GuardConfig, Ramp
from raysys.training.fiited.clicks import ClickLog, Clicks
from raysys.training.fiited.metrics import shapes
from raysys.training.fiited.trainer import StreamTrainer, Window

TABLES, DENSE, POSITION = "tables", "dense.pt", "position.json"


def run(config: TrainConfig, context: JobContext) -> Summary:
    """Train as configured; ``--resume`` goes on from the newest checkpoint."""
    log = config.log()
    context.run.write_json("columns.json", _columns(log))
    if config.shards:
        from jobs.embed.parallel import train_sharded

        result = train_sharded(config, context)
    else:
        result = _train_local(config, log, context)
    lines = write_report(context.run, result)
    return Summary(lines=lines, report="report.html")


def _train_local(config: TrainConfig, log: ClickLog, context: JobContext) -> dict[str, Any]:
    torch.set_num_threads(config.threads)
    trainer = make_trainer(config, log)
    bag = trainer.embedding
    assert isinstance(bag, FiitedEmbeddingBag)
    folder = Path(context.run.uri) / "latest"
    done = _restore(trainer, bag, folder) if context.resumed else 0
    window, windows = Window(), done // config.window
    total = config.epochs * _steps_per_epoch(config, log)
    with context.progress("training steps", total=total) as advance:
        advance(done)
        for batch in stream(config, log, skip_steps=done):
            window.add(trainer.step(batch), batch.labels)
            advance(1)
            if trainer.step_number % config.window:
                continue
            _end_window(trainer, bag, window, batch, context)
            window, windows = Window(), windows + 1
            if windows % config.save_every == 0:
                _save(trainer, bag, folder)
    if window.scores:
        _end_window(trainer, bag, window, batch, context)
    _save(trainer, bag, folder)
    context.metrics.flush()
    return {
        "stats": bag.stats(),
        "shapes": shapes(bag.store),
        "by_use": bag.store.engine.lengths_by_use(),
        "steps": trainer.step_number,
    }


def make_trainer(config: TrainConfig, log: ClickLog) -> StreamTrainer:
    """The model, its tables in this process, and the budget controllers."""
    fields, dense = log.schema.categorical, log.schema.dense
    store_config, tables = config.store_config(), config.tables(fields)
    bag = FiitedEmbeddingBag(tables, store_config).train()
    full = len(tables) * config.rows * (config.dim // config.chunk)
    ramp = guard = None
    if config.ramp > 0:
        steps = max(1, int(config.ramp * _steps_per_epoch(config, log)))
        ramp = Ramp(end=config.prune, steps=steps, full_slots=full)
    if config.guard_tol > 0:
        floor = max(len(tables), bag.store.slots // 10)
        guard = Guard(
            GuardConfig(tol=config.guard_tol, cap_slots=full, floor_slots=floor), bag.store.slots
        )
    model = build_model(
        config.model, len(fields), config.dim, len(dense), config.hidden, config.seed
    )
    return StreamTrainer(bag, model, lr=config.dense_lr, ramp=ramp, guard=guard)


def stream(config: TrainConfig, log: ClickLog, *, skip_steps: int) -> Iterator[Clicks]:
    """Batches of all epochs after the first ``skip_steps``; a smaller one may end each epoch."""
    seen = 0
    for _ in range(config.epochs):
        for batch in log.batches(config.batch):
            seen += 1
            if seen > skip_steps:
                yield batch


def to_bytes(state: Any) -> bytes:
    """A torch state as bytes."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _end_window(
    trainer: StreamTrainer,
    bag: FiitedEmbeddingBag,
    window: Window,
    batch: Clicks,
    context: JobContext,
) -> None:
    step = trainer.step_number
    summary = window.summary()
    drifted = trainer.end_window(summary)
    decision = trainer.check_quality(batch)
    stats = bag.stats()
    row = summary | {"step": step, "drift": float(drifted), "budget_slots": bag.store.slots}
    row |= {name: float(stats[name]) for name in ("rho", "rho_bytes", "mapped_bytes", "rows")}
    row |= {name: float(stats[name]) for name in ("alive", "grown", "evicted", "hit_rate")}
    context.run.append_rows("windows", [row])
    for name in ("auc", "log_loss", "rho_bytes", "mapped_bytes"):
        context.metrics.record(f"fiited_{name}", row[name], step=step)
    if drifted:
        context.console.print(f"step {step}: drift; one full round was run")
    if decision is not None and decision.action != "hold":
        context.console.print(
            f"step {step}: {decision.action} the budget to {decision.slots} chunks"
        )


def _save(trainer: StreamTrainer, bag: FiitedEmbeddingBag, folder: Path) -> None:
    """Tables and dense net under one name: the folder is replaced when all of it is there."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    checkpoint.save(bag.store, partial / TABLES)
    (partial / DENSE).write_bytes(to_bytes(trainer.state_dict()))
    position = {"step": trainer.step_number, "slots": bag.store.slots}
    (partial / POSITION).write_text(json.dumps(position), encoding="utf-8")
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _restore(trainer: StreamTrainer, bag: FiitedEmbeddingBag, folder: Path) -> int:
    """Steps done before; an interrupted replacement leaves the old folder, which then counts."""
    old = folder.with_name(f".{folder.name}.old")
    if not folder.exists() and old.exists():
        old.rename(folder)
    if not folder.exists():
        return 0
    position = json.loads((folder / POSITION).read_text(encoding="utf-8"))
    if position["slots"] != bag.store.slots:
        bag.store.set_budget(position["slots"])
    checkpoint.load(bag.store, folder / TABLES)
    state = torch.load(folder / DENSE, weights_only=True)
    trainer.load_state_dict(state)
    return int(position["step"])


def _steps_per_epoch(config: TrainConfig, log: ClickLog) -> int:
    return -(-log.count_rows() // config.batch)


def _columns(log: ClickLog) -> dict[str, Any]:
    schema = log.schema
    return {
        "label": schema.label,
        "categorical": list(schema.categorical),
        "dense": list(schema.dense),
        "files": [str(path) for path in log.paths],
    }


JOB = Job(
    name="embed train",
    config=TrainConfig,
    run=run,
    flags=("data", "model", "prune", "shards", "workers"),
)
