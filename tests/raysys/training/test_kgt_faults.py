"""Unusual models, data, optimizers and machines: each has a defined result."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel as Parallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from raysys.errors import CapabilityError, ConfigError, DataError
from raysys.training.kgt import (
    KGT,
    CacheConfig,
    DataDescription,
    KGTConfig,
    NoFreezing,
    Replay,
    StaticFreezing,
)
from raysys.training.kgt import watch as watching
from raysys.training.kgt.cache import ActivationCache
from raysys.training.kgt.inline import load_per_core
from raysys.training.kgt.loop import Recipe, TrainData, TrainLoop
from raysys.training.kgt.plan import parse
from raysys.training.kgt.watch import WatchedKGT

ROWS = 12
QUICK = KGTConfig(
    window=2, every=2, bootstrap_window=2, bootstrap_rate=10.0, min_bootstrap_share=0,
    reference="fp32", coef=50.0, modules=16,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def chain(*inner: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), *inner, nn.Linear(8, 2))


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(ROWS, 4), torch.randint(0, 2, (ROWS,))


def session(model: nn.Module, optimizer: Any = None, **options: Any) -> KGT:
    chosen = optimizer or torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    options = {"config": QUICK, "example": batch()[:1], "total_steps": 200, **options}
    return KGT(model, chosen, **options)


def steps(kgt: KGT, count: int, *, to_none: bool = True) -> None:
    x, y = batch()
    for _ in range(count):
        loss = functional.cross_entropy(kgt(x), y)
        torch.autograd.backward(loss)
        kgt.optimizer.step()
        kgt.step(loss)
        kgt.optimizer.zero_grad(set_to_none=to_none)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_module_without_parameters_in_the_prefix_freezes_with_it() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    plan = parse(model, batch()[:1], modules=16, pattern="[0-3]")
    assert not plan.modules[0].parameters
    kgt = session(model, plan=plan, control=NoFreezing())
    kgt.apply(len(kgt.plan) - 1)  # neighbours may have been merged by their measured time
    before = state(model)
    steps(kgt, 3)
    assert torch.equal(before["1.weight"], model.state_dict()["1.weight"])
    assert not torch.equal(before["3.weight"], model.state_dict()["3.weight"])


class StochasticDepth(nn.Module):
    """Skips each row's branch at random while training, by a mask that can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(8, 8)
        self.drop = nn.Dropout1d(0.5)

    def forward(self, x: Tensor) -> Tensor:
        kept: Tensor = self.drop(self.branch(x)[None])[0]
        return x + kept


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm1d(8),
        lambda: nn.SyncBatchNorm(8),
        lambda: nn.GroupNorm(2, 8),
        lambda: nn.LayerNorm(8),
        StochasticDepth,
    ],
)
def test_norms_and_dropout_in_the_prefix_are_in_eval_mode(norm: Callable[[], nn.Module]) -> None:
    model = chain(norm(), nn.Dropout(0.5))
    kgt = session(model, control=NoFreezing())
    kgt.apply(len(kgt.plan) - 1)
    before, x = state(model), batch()[0]
    model.train()
    assert torch.equal(kgt(x), kgt(x))  # no dropout, no batch statistics
    steps(kgt, 3)
    after = model.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == {"3.weight", "3.bias"}


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, foreach=True),
        lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
        lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    ],
)
def test_optimizers_skip_missing_gradients_however_they_are_cleared(make: Any) -> None:
    model = chain(nn.Linear(8, 8))
    grouping = [["0"], ["1"], ["2"]]
    optimizer = make(model.parameters())
    kgt = session(model, optimizer, control=NoFreezing(), signature=grouping)
    steps(kgt, 3, to_none=False)
    kgt.apply(1)
    before = state(model)
    steps(kgt, 3, to_none=False)
    assert torch.equal(before["0.weight"], model.state_dict()["0.weight"])
    assert not torch.equal(before["1.weight"], model.state_dict()["1.weight"])
    assert kgt.frozen_upto == 1  # the check of the first step found nothing


def test_averaged_weights_and_clipping_leave_the_prefix_alone() -> None:
    model = chain(nn.Linear(8, 8))
    kgt = session(model, control=NoFreezing(), signature=[["0"], ["1"], ["2"]])
    kgt.apply(1)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    before, (x, y) = state(model), batch()
    for _ in range(3):
        loss = functional.cross_entropy(kgt(x), y)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        kgt.optimizer.step()
        averaged.update_parameters(model)
        kgt.step(loss)
        kgt.optimizer.zero_grad()
    after, mean = model.state_dict(), averaged.module.state_dict()
    for name in ("0.weight", "0.bias"):
        assert torch.equal(before[name], after[name])
        assert torch.equal(before[name], mean[name])
    assert not torch.equal(mean["2.weight"], after["2.weight"])
    assert kgt.frozen_upto == 1


def test_the_largest_rate_counts_and_a_plateau_scheduler_releases() -> None:
    model = chain(nn.Linear(8, 8))
    groups = [{"params": model[0].parameters(), "lr": 1e-4}, {"params": model[1:].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.05)
    kgt = session(model, optimizer)
    assert kgt.rate() == 0.05
    steps(kgt, 60)
    assert kgt.frozen_upto > 0
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
    plateau.step(1.0)
    plateau.step(2.0)
    steps(kgt, 1)
    assert kgt.frozen_upto == 0
    for group in optimizer.param_groups:
        group["lr"] = 0.05  # raised again: nothing to release, and nothing breaks
    steps(kgt, 4)


class Answers(nn.Module):
    """A traced model may answer with a tuple or a mapping, None inside."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        logits = self.head(torch.relu(self.b(torch.relu(self.a(x)))))
        return (logits, None) if self.kind == "tuple" else {"logits": logits, "loss": None}


@pytest.mark.parametrize(("kind", "key"), [("tuple", 0), ("dict", "logits")])
def test_outputs_may_be_tuples_and_mappings_with_none(kind: str, key: Any) -> None:
    model = Answers(kind)
    kgt = session(model, control=NoFreezing())
    kgt.apply(1)
    x, y = batch()
    out = kgt(x)
    assert type(out) is type(model(x))
    torch.autograd.backward(functional.cross_entropy(out[key], y))
    assert model.a.weight.grad is None
    assert model.head.weight.grad is not None


def test_compilation_wraps_the_runner_and_changes_nothing() -> None:
    trained = []
    for wrap in (None, lambda runner: torch.compile(runner, backend="eager")):
        torch.manual_seed(0)
        model = chain(nn.ReLU(), nn.Linear(8, 8))
        control = Replay([(2, 1), (4, 2), (6, 0)])
        grouping = [["0"], ["2"], ["3"]]
        kgt = session(model, control=control, signature=grouping, wrap=wrap)
        steps(kgt, 8)
        trained.append(state(model))
    plain, compiled = trained
    assert all(torch.equal(plain[name], compiled[name]) for name in plain)


def test_data_parallel_with_a_static_graph_is_built_anew_at_each_change(tmp_path: Path) -> None:
    trained = []
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        for wrap in (None, functools.partial(Parallel, static_graph=True)):
            torch.manual_seed(0)
            model = chain(nn.ReLU(), nn.Linear(8, 8))
            control = Replay([(2, 1), (4, 2), (6, 0)])
            grouping = [["0"], ["2"], ["3"]]
            kgt = session(model, control=control, signature=grouping, wrap=wrap)
            steps(kgt, 8)
            trained.append(state(model))
    finally:
        dist.destroy_process_group()
    plain, parallel = trained
    assert all(torch.equal(plain[name], parallel[name]) for name in plain)


def test_a_checkpoint_of_another_number_of_ranks_is_refused() -> None:
    x, y = batch()
    data, recipe = TrainData(x, y, np.arange(ROWS)), Recipe(epochs=1, batch_size=4)
    two = TrainLoop(chain(), data, recipe, QUICK, rank=0, world=2)
    one = TrainLoop(chain(), data, recipe, QUICK)
    with pytest.raises(DataError, match="2 ranks, not 1"):
        one.load_state_dict(two.state_dict())


class FullyShardedDataParallel(nn.Module):
    """Known by its name."""


class DistributedDataParallel(nn.Module):
    """Known by its name."""


class OptimizedModule(nn.Module):
    """Known by its name: what torch.compile returns."""


def test_sharded_and_wrapped_models_are_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match="FSDP or ZeRO"):
        session(chain(FullyShardedDataParallel()))
    with pytest.raises(ConfigError, match="wrap="):
        session(chain(DistributedDataParallel()))
    with pytest.raises(ConfigError, match=r"wrap=torch\.compile"):
        session(chain(OptimizedModule()))


def test_a_callback_on_several_ranks_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(watching.dist, "get_world_size", lambda: 2)
    model = chain()
    with pytest.raises(CapabilityError, match="2 ranks"):
        WatchedKGT(model, torch.optim.SGD(model.parameters(), 0.1), QUICK, 10)


def test_a_missing_load_sensor_skips_no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> tuple[float, float, float]:
        raise OSError("no load average here")

    monkeypatch.setattr(os, "getloadavg", missing)
    assert load_per_core() == 0.0


def cached(folder: Path) -> ActivationCache:
    cache = ActivationCache(CacheConfig(directory=str(folder)), np.arange(ROWS), "data")
    cache.move(1)
    return cache


def double(values: Any, upto: int, h: Tensor | None, start: int) -> Tensor:
    out: Tensor = values[0] * 2
    return out


def test_rows_of_another_length_turn_the_cache_off(tmp_path: Path) -> None:
    cache, ids = cached(tmp_path), np.arange(ROWS)
    short, long = torch.ones(4, 3), torch.ones(8, 5)
    assert torch.equal(cache.gather(ids[:4], (short,), double), short * 2)
    assert torch.equal(cache.gather(ids[4:], (long,), double), long * 2)
    assert "Pad examples" in cache.off_reason
    cache.close()


def test_the_same_example_padded_differently_is_not_read_back(tmp_path: Path) -> None:
    cache, ids = cached(tmp_path), np.arange(4)
    cache.gather(ids, (torch.ones(4, 3),), double)
    longer = torch.ones(4, 5)
    assert torch.equal(cache.gather(ids, (longer,), double), longer * 2)
    assert "another input" in cache.off_reason
    cache.close()


def test_a_sampler_with_replacement_may_repeat_ids(tmp_path: Path) -> None:
    cache = cached(tmp_path)
    x = torch.arange(ROWS, dtype=torch.float32)[:, None]
    drawn = np.array([3, 3, 5, 3])
    for _ in range(3):
        assert torch.equal(cache.gather(drawn, (x[drawn],), double), x[drawn] * 2)
    assert cache.stats.hits == 8
    cache.close()


def test_batches_without_ids_are_computed(tmp_path: Path) -> None:
    config = KGTConfig(modules=16, cache=CacheConfig(directory=str(tmp_path)))
    described = DataDescription(ids=np.arange(ROWS), fingerprint="data")
    model = chain(nn.Linear(8, 8))
    control = StaticFreezing(0, 1)
    kgt = session(model, config=config, data=described, control=control)
    steps(kgt, 4)  # an iterable data set has no ids
    assert kgt.frozen_upto == 1
    assert kgt.status()["cache_bytes"] == 0
    kgt.close()
