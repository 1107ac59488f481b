"""Train a network and freeze its converged front layers (KGT); baselines, resume, data parallel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from jobs.launcher import Job, JobContext, Summary, main
from jobs.train import data
from jobs.train.config import TrainConfig
from jobs.train.figures import plasticity_svg
from jobs.train.pretrained import exported
from jobs.train.run import STATE_FILE, all_events, from_bytes, make_loop, to_bytes, train
from raysys import scratch
from raysys.training.datasets import Split
from raysys.training.kgt import EventLog
from raysys.training.kgt.config import resolve
from raysys.training.kgt.events import frozen_share, timeline
from raysys.training.kgt.loop import TrainLoop

Events = Callable[[], list[dict[str, Any]]]


def run(config: TrainConfig, context: JobContext) -> Summary:
    """Train as configured; ``--resume`` goes on from the newest checkpoint."""
    split = data.load(config.data, config.seed)
    if config.dry_run:
        return _dry_run(config, split)
    if config.workers > 1:
        return _parallel(config, context)
    with scratch.folder("kgt") as folder:
        return _train_here(config, context, split, str(folder))


def _train_here(config: TrainConfig, context: JobContext, split: Split, folder: str) -> Summary:
    """Train in this process; a controller actor keeps its files in ``folder``."""
    saved = context.run.load_checkpoint() if context.resumed else None
    state = from_bytes(saved[1][STATE_FILE]) if saved is not None else None
    log = EventLog()
    if config.control == "actors" and config.method == "kgt":
        context.ray()
    options = {"signature": state["kgt"]["signature"]} if state is not None else {}
    loop = make_loop(config, split, log=log, folder=folder, **options)
    if state is not None:
        loop.load_state_dict(state)
        log.rows = list(state["events"])
    try:
        _train(loop, partial(all_events, log, folder), config, context)
        return _finish(loop, all_events(log, folder), split, context)
    finally:
        loop.close()


def _train(loop: TrainLoop, events: Events, config: TrainConfig, context: JobContext) -> None:
    with context.progress("optimizer steps", total=loop.total_steps) as advance:
        advance(loop.step)

        def save(step: int, state: Mapping[str, Any]) -> None:
            content = to_bytes({**state, "events": events()})
            context.run.save_checkpoint(step, {STATE_FILE: content})
            status = loop.kgt.status()
            context.metrics.record("training_loss", loop.last_loss, step=step)
            context.metrics.record("frozen_modules", status["frozen"], step=step)
            context.metrics.record("cache_hit_rate", status["cache_hit_rate"], step=step)
            context.metrics.record("training_cpu_s", loop.cpu_s, step=step)

        train(loop, config.checkpoint_every, save, advance)


def _finish(
    loop: TrainLoop, rows: list[dict[str, Any]], split: Split, context: JobContext
) -> Summary:
    test = data.tensors(split.test)
    accuracy = loop.accuracy(test.x, test.y)
    modules = len(loop.kgt.plan)
    share = frozen_share(rows, modules, loop.total_steps)
    skipped = int(getattr(loop.kgt.control, "skipped", 0))
    result = {
        "accuracy": accuracy,
        "steps": loop.total_steps,
        "cpu_s": loop.cpu_s,
        "frozen_share_per_module": share,
        "cache_hit_rate": loop.kgt.status()["cache_hit_rate"],
        "skipped_readings": skipped,
        "modules": list(loop.kgt.plan.lines()),
        "notes": loop.kgt.notes,
    }
    context.run.write_json("result.json", result)
    context.run.append_rows("freezing", [_flat(row) for row in rows])
    context.run.storage.write("freezing.svg", plasticity_svg(rows).encode())
    for name, content in exported(loop.model).items():
        context.run.storage.write(f"model/{name}", content)
    lines = [
        f"accuracy {accuracy:.4f} after {loop.total_steps} steps, {loop.cpu_s:.1f} CPU seconds",
        f"frozen {sum(share) / modules:.0%} of all modules and steps",
        *timeline(rows, modules, loop.total_steps),
        *[f"note: {note}" for note in loop.kgt.notes],
    ]
    if skipped:
        lines.append(
            f"note: {skipped} readings were skipped (busy reference, load, no finite value)"
        )
    return Summary(lines=lines, report="freezing.svg")


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Events have different fields; one type per column makes them one table."""
    text = ("event", "reason")
    return {
        name: str(value) if name in text else (None if value is None else float(value))
        for name, value in row.items()
    }


def _dry_run(config: TrainConfig, split: Split) -> Summary:
    loop = make_loop(config, split)
    options = resolve(config.kgt, loop.total_steps, len(loop.kgt.plan))
    lines = [
        f"{loop.kgt.plan.mode}: {len(loop.kgt.plan)} layer modules, {loop.total_steps} steps",
        *loop.kgt.plan.lines(),
        f"a reading every n = {options.every} steps, window W = {options.window}",
        *[f"note: {note}" for note in loop.kgt.notes],
    ]
    loop.close()
    return Summary(lines=lines)


def _parallel(config: TrainConfig, context: JobContext) -> Summary:
    from jobs.train.parallel import train_parallel

    context.ray(num_cpus=max(4, config.workers + 1))
    storage = str(Path(context.run.uri).absolute() / "ray-train")
    metrics = train_parallel(config, storage, "train")
    context.run.write_json("result.json", metrics)
    lines = [
        f"accuracy {metrics['accuracy']:.4f} after {metrics['step']} steps on "
        f"{config.workers} workers",
        f"frozen {metrics['frozen']} of {metrics['modules']} modules at the end",
    ]
    return Summary(lines=lines)


JOB = Job(name="train", config=TrainConfig, run=run)

if __name__ == "__main__":
    raise SystemExit(main(JOB))
