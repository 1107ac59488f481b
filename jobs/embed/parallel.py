"""Training over embedding servers: the dense net data-parallel with Ray Train, tables on shards.

A checkpoint is fixed right after an exchange and before the dense net's step, so that tables and
net agree: a resumed run repeats that batch from the exchange on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ray import train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from torch.nn.parallel import DistributedDataParallel

from actors.fiited import ShardGroup
from actors.fiited.saves import complete, latest_exchange, partial_folder
from jobs.embed.config import TrainConfig
from jobs.embed.network import build_model
from jobs.embed.train import DENSE, stream, to_bytes
from jobs.launcher import JobContext
from raysys.config import config_from_dict, config_to_dict
from raysys.errors import RemoteError
from raysys.runs import RunDirectory
from raysys.training.fiited.clicks import Clicks
from raysys.training.fiited.metrics import group_statistics, shapes_of
from raysys.training.fiited.trainer import StreamTrainer, Window


def train_sharded(config: TrainConfig, context: JobContext) -> dict[str, Any]:
    """Start the shards and the trainers, wait, and collect the shards' figures.

    Raises:
        RemoteError: trainers failed more often than they may be restarted.
    """
    context.ray(num_cpus=max(2, config.workers + config.shards + 1))
    root = str(Path(context.run.uri).absolute())
    tables = config.tables(config.log().schema.categorical)
    group = ShardGroup.start(
        config.store_config(), tables, shards=config.shards, workers=config.workers,
        root=f"{root}/shards", wire=config.wire, cpus=0,
    )  # fmt: skip
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"config": config_to_dict(config), "group": group, "run": root},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=config.workers, use_gpu=False),
        run_config=RunConfig(
            name="trainers", storage_path=f"{root}/ray-train",
            failure_config=FailureConfig(max_failures=0),
        ),
    )  # fmt: skip
    try:
        trainer.fit()
        return _result(group, latest_exchange(Path(root) / "shards"))
    except train.TrainingFailedError as error:
        remedy = "See Ray's worker logs; --resume goes on from the newest save"
        raise RemoteError("a training worker", str(error), remedy) from error
    finally:
        group.close()


def _worker(options: dict[str, Any]) -> None:
    config = config_from_dict(TrainConfig, options["config"])
    context = train.get_context()
    Rank(
        config, options["group"], RunDirectory.open(options["run"]),
        context.get_world_rank(), context.get_world_size(),
    ).run()  # fmt: skip


class Rank:
    """One trainer: its part of every batch, and on rank 0 the record and the saves."""

    def __init__(
        self, config: TrainConfig, group: ShardGroup, run: RunDirectory, rank: int, world: int
    ) -> None:
        torch.set_num_threads(config.threads)
        self.config, self.group, self.run_directory = config, group, run
        self.rank, self.world = rank, world
        self.log = config.log()
        self.root = Path(group.root)
        schema = self.log.schema
        net = build_model(
            config.model, len(schema.categorical), config.dim, len(schema.dense), config.hidden,
            config.seed,
        )  # fmt: skip
        self.net = net
        self.embedding = group.embedding(worker=rank).train()
        model = DistributedDataParallel(net) if world > 1 else net
        self.trainer = StreamTrainer(self.embedding, model, lr=config.dense_lr)
        self.pending: Any = None
        self.wire_before: dict[str, int] | None = None

    def run(self) -> None:
        """Train to the end of the log; the last gradients are sent before the last save."""
        self._restore()
        window = Window()
        for batch in stream(self.config, self.log, skip_steps=self.trainer.step_number):
            part = self._part(batch)
            if part is None:
                continue
            window.add(self.trainer.step(part, self._maybe_save), part.labels)
            if self.trainer.step_number % self.config.window == 0:
                self._end_window(window)
                window = Window()
        if window.scores:
            self._end_window(window)
        self.embedding.keep_gradients()
        self.embedding.finish()
        self._save()
        self._end_save()
        train.report({"step": self.trainer.step_number})

    def _part(self, batch: Clicks) -> Clicks | None:
        """This rank's equal share; the few samples that cannot be shared out are left."""
        size = len(batch) // self.world
        if size == 0:
            return None
        self.embedding.share = 1 / self.world
        self.embedding.loss_scale = float(size * self.world)
        return batch.rows(self.rank * size, (self.rank + 1) * size)

    def _maybe_save(self) -> None:
        """Between the exchange and the step: every so many windows a save begins or ends."""
        if self.wire_before is not None:  # the save has counted the exchange that was repeated
            self.embedding.wire_bytes, self.wire_before = self.wire_before, None
        step, every = self.trainer.step_number, self.config.window * self.config.save_every
        if step and step % every == 0:
            self._save()
        elif self.pending is not None and step % self.config.window == 0:
            self._end_save()
        if step % self.config.window == 0:
            self.embedding.checkpointed(latest_exchange(self.root))

    def _save(self) -> None:
        if self.rank:
            return
        self._end_save()
        exchange = self.embedding.exchanges - 1
        self.pending = self.group.begin_save(exchange)
        folder = partial_folder(self.root, exchange)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.trainer.state_dict() | {"model": self.net.state_dict()}
        state["wire"] = dict(self.embedding.wire_bytes)
        (folder / DENSE).write_bytes(to_bytes(state))

    def _end_save(self) -> None:
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        facts = self.group.end_save(pending)
        self.run_directory.append_rows("saves", [{k: float(v) for k, v in facts.items()}])

    def _restore(self) -> None:
        saves = complete(self.root)
        if not saves:
            return
        state = torch.load(saves[-1] / DENSE, weights_only=True)
        self.net.load_state_dict(state.pop("model"))
        self.trainer.optimizer.load_state_dict(state["optimizer"])
        self.trainer.drift.state = list(state["drift"])
        self.trainer.step_number = int(state["step"])
        self.wire_before = state.get("wire")

    def _end_window(self, window: Window) -> None:
        """Rank 0 notes the window over all ranks' samples."""
        parts: list[Any] = [(np.concatenate(window.scores), np.concatenate(window.labels))]
        if self.world > 1:
            gathered: list[Any] = [None] * self.world
            dist.all_gather_object(gathered, parts[0])
            parts = gathered
        if self.rank:
            return
        whole = Window()
        for scores, labels in parts:
            whole.add(scores, labels)
        summary = whole.summary()
        drifted = self.trainer.end_window(summary)
        stats = group_stats(self.group)
        wire = self.embedding.wire_bytes
        row = summary | {"step": float(self.trainer.step_number), "drift": float(drifted)}
        names = (
            "rho",
            "rho_bytes",
            "mapped_bytes",
            "rows",
            "alive",
            "grown",
            "evicted",
            "hit_rate",
        )
        row |= {name: stats[name] for name in names}
        row |= {"wire_out_bytes": float(wire["out"]), "wire_in_bytes": float(wire["in"])}
        self.run_directory.append_rows("windows", [row])


def group_stats(group: ShardGroup) -> dict[str, float]:
    """Figures over all shards, and how unequal their traffic is."""
    return _merged(group, group.stats())


def _merged(group: ShardGroup, found: list[dict[str, Any]]) -> dict[str, float]:
    total = group_statistics(group.config, group.tables, found)
    loads = [float(s["loads"].sum()) for s in found]
    total["load_max_over_mean"] = max(loads) / max(sum(loads) / len(loads), 1.0)
    return total


def _result(group: ShardGroup, steps: int) -> dict[str, Any]:
    found = group.stats()
    lengths, columns, by_use = (sum(s[n] for s in found) for n in ("lengths", "columns", "by_use"))
    return {
        "stats": _merged(group, found), "steps": steps,
        "shapes": shapes_of(group.tables, lengths, columns), "by_use": by_use,
    }  # fmt: skip
