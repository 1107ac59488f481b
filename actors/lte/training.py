"""LTE on Ray: stages under Ray Train, a sweep over eta as parallel actors, layers clustered as
tasks.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray import train as ray_train
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from actors.lte.progress import LOG_FILE, RowLog
from raysys import machine, scratch
from raysys.config import config_from_dict, config_to_dict
from raysys.errors import RemoteError
from raysys.training.lte.config import ConvertConfig
from raysys.training.lte.grouping import Floats, Groups, group
from raysys.training.lte.pareto import hopeless
from raysys.training.lte.program import ProgramConfig, train

STATE_FILE = "stage.pt"


def fit(
    config: ProgramConfig,
    storage: str,
    name: str,
    *,
    workers: int = 1,
    worker: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Train a stage on Ray Train; a dead worker resumes from the last state.

    Args:
        config: the stage; paths are on a file system that every worker sees.
        storage: folder of Ray Train's checkpoints; the same ``storage`` and ``name`` go on with
            an earlier run.
        workers: data-parallel workers; gradients are summed over them.
        worker: another body than :func:`work`, for tests.

    Raises:
        RemoteError: the workers failed more often than they may be restarted.

    Rows of every step and evaluation go to :func:`log_path` as they come.
    """
    use_gpu = bool(machine.gpu_names())
    trainer = TorchTrainer(
        worker or work,
        train_loop_config={
            "config": config_to_dict(config),
            "log": str(log_path(storage, name)),
        },
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu),
        run_config=RunConfig(
            name=name, storage_path=storage, failure_config=FailureConfig(max_failures=2)
        ),
    )
    try:
        result = trainer.fit()
    except ray_train.TrainingFailedError as error:
        raise RemoteError("a training worker", str(error), "See Ray's worker logs") from error
    return dict(result.metrics or {})


def log_path(storage: str, name: str) -> Path:
    """Where a run's rows are."""
    return Path(storage) / name / LOG_FILE


def work(options: dict[str, Any]) -> None:
    """One worker of Ray Train."""
    run_worker(options, report_to_ray)


def run_worker(
    options: dict[str, Any], report: Callable[[dict[str, Any], bytes | None], None]
) -> None:
    """The body of a worker with its way to report."""
    config = config_from_dict(ProgramConfig, options["config"])
    context = ray_train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    reduce = all_reduce if world > 1 else None
    train(
        config, report, saved=saved_state(), rank=rank, world=world, reduce=reduce,
        started=functools.partial(RowLog, Path(options["log"])),
    )  # fmt: skip


def all_reduce(values: torch.Tensor) -> None:
    """Sum over the workers, in place."""
    dist.all_reduce(values)


def saved_state() -> bytes | None:
    """State of the checkpoint to go on from."""
    checkpoint = ray_train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return (Path(folder) / STATE_FILE).read_bytes()


def report_to_ray(figures: dict[str, Any], state: bytes | None) -> None:
    """Hand figures and a state to Ray Train."""
    if state is None:
        ray_train.report(figures)
        return
    with scratch.folder("lte") as folder:
        (folder / STATE_FILE).write_bytes(state)
        ray_train.report(figures, checkpoint=Checkpoint.from_directory(folder))


class SweepActor:
    """Trains stages for values of eta; a plain class, the job makes it an actor."""

    def run(self, config: ProgramConfig) -> dict[str, Any]:
        """One stage to its end; its final figures."""
        return train(config, _ignore)


def sweep(
    base: ProgramConfig, etas: Sequence[float], out: Path, *, stage2_steps: int,
    parallel: int = 2, stop_margin: float = math.inf,
) -> list[dict[str, Any]]:  # fmt: skip
    """Train one model per eta on parallel actors; rows in the order of ``etas``.

    Args:
        base: stage 1 with everything but eta.
        out: folder for the models.
        stage2_steps: optimiser steps of stage 2.
        parallel: actors at a time.
        stop_margin: nats by which a point must be behind a sparser one after stage 1 to stop
            there (:func:`~raysys.training.lte.pareto.hopeless`).
    """
    actor = ray.remote(num_cpus=1)(SweepActor)
    actors = [actor.remote() for _ in range(min(parallel, len(etas)))]

    def every(programs: Sequence[ProgramConfig]) -> list[dict[str, Any]]:
        waiting = [actors[i % len(actors)].run.remote(one) for i, one in enumerate(programs)]
        found: list[dict[str, Any]] = ray.get(waiting)
        return found

    ones = [_point(base, eta, out / f"eta-{eta:g}" / "stage1") for eta in etas]
    firsts = every(ones)
    stopped = hopeless(firsts, stop_margin)
    twos = [
        dataclasses.replace(
            one, model=one.out, out=str(Path(one.out).with_name("stage2")),
            stage=dataclasses.replace(one.stage, stage=2, steps=stage2_steps),
        )
        for one, stop in zip(ones, stopped) if not stop
    ]  # fmt: skip
    seconds = iter(zip(every(twos), twos))
    rows = []
    for eta, one, first, stop in zip(etas, ones, firsts, stopped):
        last, program = (first, one) if stop else next(seconds)
        rows.append(_row(eta, first, last, program.out, stopped=stop))
    return rows


def _point(base: ProgramConfig, eta: float, out: Path) -> ProgramConfig:
    stage = dataclasses.replace(base.stage, stage=1, eta=eta, target_sparsity=None)
    return dataclasses.replace(base, stage=stage, out=str(out), fit=False)


def _row(
    eta: float, first: dict[str, Any], last: dict[str, Any], model: str, *, stopped: bool
) -> dict[str, Any]:
    keys = ("sparsity", "nll", "perplexity", "sparsity_per_layer")
    figures = {key: last[key] for key in keys}
    return {"eta": eta, **figures, "nll_stage1": first["nll"], "stopped": stopped, "model": model}


def cluster_on_ray(features: Sequence[Floats], config: ConvertConfig) -> list[Groups]:
    """Cluster every layer in a task of its own."""
    task = ray.remote(num_cpus=1)(group)
    waiting = [
        task.remote(ray.put(x), config.expert_size, config.grouping, config.seed) for x in features
    ]
    found: list[Groups] = ray.get(waiting)
    return found


def _ignore(figures: dict[str, Any], state: bytes | None) -> None:
    """A sweep's points are short; they start over instead of resuming."""
