"""Data-parallel training on Ray Train: one worker per rank, gloo, one decision for all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ray import train
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from jobs.train import data, network
from jobs.train.config import TrainConfig
from jobs.train.run import STATE_FILE, from_file, make_control, to_bytes
from raysys import scratch
from raysys.config import config_from_dict, config_to_dict
from raysys.errors import RemoteError
from raysys.training.kgt import Control, EventLog, ModulePlan
from raysys.training.kgt.baselines import schedule_of
from raysys.training.kgt.distributed import ByteCount, DistributedControl, data_parallel
from raysys.training.kgt.loop import TrainLoop
from raysys.training.kgt.plan import parse


def train_parallel(config: TrainConfig, storage: str, name: str) -> dict[str, Any]:
    """Train with several workers; returns rank 0's last metrics.

    Raises:
        RemoteError: the workers failed more often than they may be restarted.
    """
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"config": config_to_dict(config)},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=config.workers, use_gpu=False),
        run_config=RunConfig(
            name=name, storage_path=storage, failure_config=FailureConfig(max_failures=2)
        ),
    )
    try:
        result = trainer.fit()
    except train.TrainingFailedError as error:
        raise RemoteError("a training worker", str(error), "See Ray's worker logs") from error
    return dict(result.metrics or {})


def _worker(options: dict[str, Any]) -> None:
    config = config_from_dict(TrainConfig, options["config"])
    context = train.get_context()
    train_rank(config, context.get_world_rank(), context.get_world_size(), _saved(), _report)


def train_rank(
    config: TrainConfig,
    rank: int,
    world: int,
    saved: dict[str, Any] | None,
    report: Callable[[dict[str, Any], bytes | None], None],
) -> None:
    """One rank's training inside an initialised process group.

    Args:
        saved: rank 0's checkpoint to go on from.
        report: takes an epoch's metrics, and on rank 0 a checkpoint; called once per epoch.
    """
    config = _own_cache(config, rank)
    split = data.load(config.data, config.seed)
    log, count = EventLog(), ByteCount()
    signature = saved["kgt"]["signature"] if saved is not None else _signature(config, split, rank)
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    model = network.build(config.network, split)

    def control(plan: ModulePlan, steps: int) -> Control:
        inner = make_control(config, model, plan, steps, log) if rank == 0 else None
        return DistributedControl(inner, rank, every=config.exchange_every)

    loop = TrainLoop(
        model,
        data.tensors(split.train),
        config.recipe,
        config.kgt,
        control=control,
        signature=signature,
        wrap=data_parallel(count),
        log=log,
        rank=rank,
        world=world,
    )
    if saved is not None:
        loop.load_state_dict(saved if rank == 0 else {**saved, "kgt": _without_cache(saved)})
    test = data.tensors(split.test)
    while not loop.done:
        before, step = count.total, loop.step
        loop.run(until=loop.step + loop.steps_per_epoch)
        metrics = {
            "step": loop.step,
            "frozen": loop.kgt.frozen_upto,
            "modules": len(loop.kgt.plan),
            "accuracy": loop.accuracy(test.x, test.y),
            "reduced_bytes_per_step": (count.total - before) / max(1, loop.step - step),
            "applied": schedule_of(log.rows),
            "cache_hit_rate": loop.kgt.status()["cache_hit_rate"],
            "ranks_agree": _ranks_agree(loop.model),
        }
        report(metrics, to_bytes(loop.state_dict()) if rank == 0 else None)
    loop.close()


def _ranks_agree(model: torch.nn.Module) -> bool:
    """Whether all ranks hold bit-identical parameters; a collective call."""
    mine = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    zero = mine.clone()
    dist.broadcast(zero, src=0)
    equal = torch.tensor([float(torch.equal(mine, zero))])
    dist.all_reduce(equal, op=dist.ReduceOp.MIN)
    return bool(equal.item())


def _own_cache(config: TrainConfig, rank: int) -> TrainConfig:
    """Each worker has a cache directory of its own."""
    cache = config.kgt.cache
    if not cache.directory:
        return config
    own = dataclasses.replace(cache, directory=str(Path(cache.directory) / f"rank-{rank}"))
    return dataclasses.replace(config, kgt=dataclasses.replace(config.kgt, cache=own))


def _signature(config: TrainConfig, split: Any, rank: int) -> Any:
    """Rank 0 measures and groups; the others take its grouping."""
    message: list[Any] = [None]
    if rank == 0:
        model = network.build(config.network, split)
        example = (torch.from_numpy(split.train.x[: config.recipe.batch_size]),)
        options = config.kgt
        plan = parse(model, example, modules=options.modules, pattern=options.pattern)
        message = [plan.signature()]
    dist.broadcast_object_list(message, src=0)
    return message[0]


def _without_cache(saved: dict[str, Any]) -> dict[str, Any]:
    """Rank 0's cache describes rank 0's rows only; another rank starts with an empty one."""
    return {**saved["kgt"], "cache": None}


def _saved() -> dict[str, Any] | None:
    checkpoint = train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return from_file(Path(folder) / STATE_FILE)


def _report(metrics: dict[str, Any], content: bytes | None) -> None:
    if content is None:
        train.report(metrics)
        return
    with scratch.folder("train") as folder:
        (folder / STATE_FILE).write_bytes(content)
        train.report(metrics, checkpoint=Checkpoint.from_directory(folder))
