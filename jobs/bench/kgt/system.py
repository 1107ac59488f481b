"""Systems measurements of KGT: step ceilings, kill and resume, a coreset."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from jobs.bench.kgt import tasks
from jobs.bench.pieces import Piece, measure_pieces
from raysys import scratch
from raysys.bench import Profile
from raysys.training import datasets
from raysys.training.ccs import (
    DynamicsRecorder,
    ScoreAccumulator,
    ScoringConfig,
    SelectionConfig,
    select_ccs,
)
from raysys.training.datasets import LabelledArrays
from raysys.training.kgt import (
    KGT,
    CacheConfig,
    DataDescription,
    EventLog,
    KGTConfig,
    NoFreezing,
)
from raysys.training.kgt.baselines import schedule_of
from raysys.training.kgt.controller import EventSink, ignore
from raysys.training.kgt.loop import Recipe, TrainData, TrainLoop
from raysys.training.kgt.models import ResNet, resnet20

_BATCH = 64
_STEPS = 2
_CORESET_SHARE = 0.3
_CORESET_SEED = 600
_SCORING_EPOCHS = 4
_QUICK_CORESET_EPOCHS = 24


def step_times(last_unit: str, repeats: int) -> tuple[list[float], list[float]]:
    """CPU seconds per ResNet-20 step: full, and with everything up to ``last_unit`` cached."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((2 * _BATCH, 1, 28, 28)).astype(np.float32))
    y = torch.from_numpy(rng.integers(0, 10, 2 * _BATCH))
    ids = np.arange(len(y))
    sessions = {}
    for name in ("full", "frozen"):
        torch.manual_seed(0)
        model = resnet20().train()
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        config = KGTConfig(modules=16, cache=tasks.cached())
        described = DataDescription(ids=ids, fingerprint="step-times")
        kgt = KGT(
            model,
            optimizer,
            config,
            example=(x[:_BATCH],),
            total_steps=10_000,
            data=described,
            control=NoFreezing(),
        )
        sessions[name] = kgt
    frozen = sessions["frozen"]
    upto = 1 + next(i for i, m in enumerate(frozen.plan.modules) if last_unit in m.units)
    frozen.apply(upto)
    spent: dict[str, list[float]] = {"full": [], "frozen": []}
    for name, kgt in sessions.items():
        _steps(kgt, x, y, ids, 6 if name == "frozen" else 2)  # warm up, fill the cache
    for _ in range(repeats):
        for name, kgt in sessions.items():
            spent[name].append(_steps(kgt, x, y, ids, _STEPS))
    for kgt in sessions.values():
        kgt.close()
    return spent["full"], spent["frozen"]


def _steps(kgt: KGT, x: torch.Tensor, y: torch.Tensor, ids: np.ndarray, count: int) -> float:
    start = time.process_time()
    for step in range(count):
        rows = slice(_BATCH * (step % 2), _BATCH * (step % 2) + _BATCH)
        loss = functional.cross_entropy(kgt(x[rows], ids=ids[rows]), y[rows])
        torch.autograd.backward(loss)
        kgt.optimizer.step()
        kgt.step(loss)
        kgt.optimizer.zero_grad()
    return (time.process_time() - start) / count


def resume_runs(kills: int) -> list[dict[str, Any]]:
    """Kill training processes (SIGKILL), resume, compare weights.

    At random steps before and after a switch, and once right after modules were released, where the
    checkpoint still needs the cached rows that training has no more use for.
    """
    rows = []
    rng = np.random.default_rng(0)
    for optimizer in ("sgd", "adamw"):
        events = EventLog()
        whole = _resumable(optimizer, log=events)
        whole.run()
        switches = schedule_of(events.rows)
        weights = {k: v.clone() for k, v in whole.model.state_dict().items()}
        whole.close()
        half, last = whole.total_steps // 2, whole.total_steps - 5
        ranges = [(5, half), (half, last)]
        steps = [int(rng.integers(*ranges[index % 2])) for index in range(kills)]
        for step in [*steps, _first_release(switches) + 1]:
            signalled, resumed = _killed_and_resumed(optimizer, step)
            same = all(torch.equal(weights[k], v) for k, v in resumed.model.state_dict().items())
            rows.append(
                {
                    "optimizer": optimizer,
                    "killed_at_step": step,
                    "killed_by_signal": signalled,
                    "switches": switches,
                    "identical": same and signalled == signal.SIGKILL,
                }
            )
            resumed.close()
    return rows


def _first_release(switches: Sequence[tuple[int, int]]) -> int:
    """Step at which modules begin to train again."""
    return next(
        step for (_, before), (step, after) in itertools.pairwise(switches) if after < before
    )


def _resumable(optimizer: str, folder: str = "", log: EventSink = ignore) -> TrainLoop:
    torch.set_num_threads(1)
    torch.manual_seed(3)
    split = datasets.digits()
    options = KGTConfig(
        window=2, every=4, bootstrap_rate=0.5, reference="fp32", coef=0.5, modules=16,
        cache=CacheConfig(directory=folder) if folder else tasks.cached(),
    )  # fmt: skip
    recipe = Recipe(
        epochs=5, batch_size=64, optimizer=optimizer, lr=0.02 if optimizer == "sgd" else 0.002
    )
    network = ResNet(10, widths=(8, 8, 16))
    signature = [["stem.0"], ["stem.1"], ["blocks.0"], ["blocks.1"], ["blocks.2"], ["head"]]
    return TrainLoop(
        network, tasks.train_data(split.train), recipe, options, signature=signature, log=log
    )


def _killed_and_resumed(optimizer: str, step: int) -> tuple[int, TrainLoop]:
    with scratch.folder("kgt") as folder:
        path = folder / "state.pt"
        child = os.fork()
        if child == 0:
            _train_and_die(optimizer, step, path, str(folder))
        _, status = os.waitpid(child, 0)
        loop = _resumable(optimizer, str(folder))
        loop.load_state_dict(torch.load(path, weights_only=False))
        loop.run()
    return os.WTERMSIG(status), loop


def _train_and_die(optimizer: str, step: int, path: Path, folder: str) -> None:
    """In the child: checkpoint every seven steps, die at ``step``; never returns."""
    loop = _resumable(optimizer, folder)

    def on_step() -> None:
        if loop.step % 7 == 0 or loop.step == 1:
            torch.save(loop.state_dict(), path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
        if loop.step >= step:
            os.kill(os.getpid(), signal.SIGKILL)

    loop.run(on_step=on_step)
    os._exit(1)


def coreset_runs(profile: Profile) -> list[dict[str, Any]]:
    """Vanilla on all examples against KGT with cache on a CCS coreset, same number of epochs."""
    task = tasks.mnist1d(profile, "step")
    if not profile.full:
        # With the quick recipe's 16 epochs a coreset's whole run has not the readings of one phase.
        recipe = dataclasses.replace(task.recipe, epochs=_QUICK_CORESET_EPOCHS)
        task = dataclasses.replace(task, recipe=recipe)
    kgt = tasks.Method("kgt", True, _coreset_options(task)).key(task)
    key = {"recipe": dataclasses.asdict(task.recipe), "share": _CORESET_SHARE, "kgt": kgt}
    pieces = [
        Piece(f"coreset-{seed}", {**key, "seed": seed}, functools.partial(_coreset_run, task, seed))
        for seed in range(_CORESET_SEED, _CORESET_SEED + profile.pick(1, 3))
    ]
    return measure_pieces(profile.partial, pieces)


def _coreset_options(task: tasks.Task) -> dict[str, Any]:
    """A coreset's run has fewer steps: readings at the same epochs."""
    return {"every": max(2, round(task.every * _CORESET_SHARE))}


def _coreset_run(task: tasks.Task, seed: int) -> dict[str, Any]:
    coreset, scoring_s = ccs_coreset(task, seed)
    smaller = dataclasses.replace(task, split=dataclasses.replace(task.split, train=coreset))
    whole = tasks.side_by_side(task, {"vanilla": tasks.VANILLA}, seed)["vanilla"]
    ways = {"vanilla": tasks.VANILLA, "kgt": tasks.Method("kgt", True, _coreset_options(task))}
    few = tasks.side_by_side(smaller, ways, seed)
    return {
        "seed": seed,
        "cpu_ratio": few["kgt"].cpu_s / whole.cpu_s,
        "cpu_ratio_with_scoring": (few["kgt"].cpu_s + scoring_s) / whole.cpu_s,
        "cpu_ratio_coreset_alone": few["vanilla"].cpu_s / whole.cpu_s,
        "vanilla_points": 100 * whole.accuracy,
        "coreset_points": 100 * few["vanilla"].accuracy,
        "coreset_kgt_points": 100 * few["kgt"].accuracy,
        "hit_rate": few["kgt"].hit_rate,
        "cache_bytes": few["kgt"].cache_bytes,
    }


def ccs_coreset(task: tasks.Task, seed: int) -> tuple[LabelledArrays, float]:
    """A CCS coreset of 30 % by AUM of a short scoring run; also that run's CPU seconds."""
    start = time.process_time()
    train = task.split.train
    accumulator = ScoreAccumulator(train.ids, ScoringConfig(el2n_epochs=_SCORING_EPOCHS))
    torch.manual_seed(seed)
    recipe = dataclasses.replace(task.recipe, epochs=_SCORING_EPOCHS, seed=seed)
    loop = _Recorded(task.network(), tasks.train_data(train), recipe, accumulator)
    loop.train()
    keep = round(_CORESET_SHARE * len(train))
    config = SelectionConfig(beta=0.1, class_balanced=True, relax_beta=True, seed=seed)
    chosen = select_ccs(accumulator.to_table(), keep, config)
    rows = np.flatnonzero(np.isin(train.ids, chosen.sample.ids))
    picked = train.take(rows)
    return picked, time.process_time() - start


class _Recorded:
    """A short plain training run whose logits are recorded."""

    def __init__(
        self, model: torch.nn.Module, data: TrainData, recipe: Recipe, accumulator: ScoreAccumulator
    ) -> None:
        self.model, self.data, self.recipe = model.train(), data, recipe
        self.accumulator = accumulator
        self.recorder = DynamicsRecorder(accumulator.add)

    def train(self) -> None:
        """Train with SGD at the recipe's first rate."""
        optimizer = torch.optim.SGD(
            self.model.parameters(), self.recipe.lr, momentum=0.9, nesterov=True
        )
        rng = np.random.default_rng(self.recipe.seed)
        for epoch in range(self.recipe.epochs):
            self.recorder.start_epoch(epoch)
            order = rng.permutation(len(self.data.y))
            for at in range(0, len(order), self.recipe.batch_size):
                rows = torch.from_numpy(order[at : at + self.recipe.batch_size])
                logits = self.model(self.data.x[rows])
                loss = functional.cross_entropy(logits, self.data.y[rows])
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                self.recorder.record(self.data.ids[rows.numpy()], logits, self.data.y[rows])
            self.recorder.flush()
            self.accumulator.commit(epoch)


__all__ = ["coreset_runs", "resume_runs", "step_times"]
