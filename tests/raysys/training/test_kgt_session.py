"""Freezing in a training loop: bit-equality, cache equality, resume, harmless failures."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from raysys.errors import ConfigError, DataError
from raysys.training.kgt import (
    KGT,
    CacheConfig,
    DataDescription,
    EventLog,
    KGTConfig,
    NoFreezing,
    Replay,
    StaticFreezing,
    models,
)
from raysys.training.kgt.loop import Recipe, TrainData, TrainLoop

GROUPING = [["stem.0", "stem.1"], ["blocks.0"], ["blocks.1"], ["blocks.2"], ["head"]]
QUICK = KGTConfig(
    window=2, every=2, bootstrap_window=2, bootstrap_rate=10.0, min_bootstrap_share=0,
    reference="fp32", coef=5.0, gram_rows=8,
)  # fmt: skip


def examples(rows: int = 64) -> TrainData:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, rows)
    x = (rng.standard_normal((rows, 1, 16)) + y[:, None, None]).astype(np.float32)
    return TrainData(torch.from_numpy(x), torch.from_numpy(y), np.arange(rows) * 3 + 5)


def make(config: KGTConfig | None, optimizer: str = "sgd", **options: Any) -> TrainLoop:
    torch.manual_seed(1)
    model = models.ResNet(3, widths=(4, 4, 8), dimensions=1)
    recipe = Recipe(epochs=5, batch_size=8, lr=0.01, optimizer=optimizer, clip_norm=1.0)
    return TrainLoop(model, examples(), recipe, config, signature=GROUPING, **options)


def with_cache(path: Path, **changes: Any) -> KGTConfig:
    return dataclasses.replace(QUICK, cache=CacheConfig(directory=str(path), **changes))


def weights(loop: TrainLoop) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in loop.model.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_frozen_parameters_and_buffers_stay_bit_equal(optimizer: str) -> None:
    loop = make(None, optimizer, control=lambda plan, steps: StaticFreezing(12, 3))
    loop.run(until=12)
    before = weights(loop)
    groups = [len(group["params"]) for group in loop.optimizer.param_groups]
    loop.run()
    after = weights(loop)
    frozen = [n for n in before if n.startswith(("stem", "blocks.0", "blocks.1"))]
    assert len(frozen) > 20
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert not torch.equal(before["head.weight"], after["head.weight"])
    assert [len(group["params"]) for group in loop.optimizer.param_groups] == groups


def test_released_parameters_train_again_and_modes_come_back() -> None:
    schedule = [(4, 2), (10, 0)]
    loop = make(None, control=lambda plan, steps: Replay(schedule))
    loop.run(until=8)
    assert not loop.model.get_submodule("stem.1").training
    loop.run(until=10)
    before = weights(loop)
    loop.run(until=14)
    assert loop.model.get_submodule("stem.1").training
    assert all(parameter.requires_grad for parameter in loop.model.parameters())
    assert not torch.equal(before["stem.0.weight"], weights(loop)["stem.0.weight"])


def test_what_the_user_froze_stays_frozen() -> None:
    loop = make(None, control=lambda plan, steps: Replay([(4, 2), (8, 0)]))
    loop.model.get_submodule("stem.0").requires_grad_(False)
    loop.run(until=12)
    assert not loop.model.get_submodule("stem.0").weight.requires_grad
    assert loop.model.get_submodule("stem.1").weight.requires_grad


def test_without_decisions_training_is_bit_equal_to_a_plain_loop() -> None:
    data = examples()
    torch.manual_seed(1)
    model = models.ResNet(3, widths=(4, 4, 8), dimensions=1)
    loop = make(None)
    optimizer = type(loop.optimizer)(
        model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    for rows in loop.sampler.batches(0, 8):
        loss = functional.cross_entropy(model(data.x[rows]), data.y[rows])
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    loop.run(until=8)
    assert same(dict(model.state_dict()), weights(loop))


@pytest.mark.parametrize(("dtype", "exact"), [("fp32", True), ("fp16", False), ("bf16", False)])
def test_cached_training_equals_uncached(tmp_path: Path, dtype: str, exact: bool) -> None:
    def control(plan: Any, steps: int) -> Replay:
        return Replay([(6, 2), (20, 3)])

    plain = make(QUICK, control=control)
    cached = make(with_cache(tmp_path, dtype=dtype, pays_below=1e9), control=control)
    plain.run()
    cached.run()
    assert cached.kgt.cache is not None
    assert cached.kgt.cache.stats.hits > 0
    assert cached.kgt.cache.stats.converted > 0
    x = plain.data.x
    plain.model.eval()
    cached.model.eval()
    with torch.no_grad():
        one, two = plain.model(x), cached.model(x)
    if exact:
        assert torch.equal(one, two)
    else:
        assert float((one - two).norm() / one.norm()) < (0.01 if dtype == "fp16" else 0.05)
    cached.close()


def test_a_byte_budget_mixes_cached_and_computed_rows(tmp_path: Path) -> None:
    row = 4 * 16 * 4
    config = with_cache(tmp_path, dtype="fp32", budget_bytes=20 * row, pays_below=1e9)
    loop = make(config, control=lambda plan, steps: StaticFreezing(4, 2))
    plain = make(QUICK, control=lambda plan, steps: StaticFreezing(4, 2))
    loop.run()
    plain.run()
    cache = loop.kgt.cache
    assert cache is not None
    assert 0 < cache.used_bytes <= 20 * row
    assert cache.stats.hits > 0
    assert cache.stats.misses > cache.stats.hits
    for name, value in weights(plain).items():
        assert torch.allclose(value.float(), weights(loop)[name].float(), atol=1e-4)
    loop.close()


def test_read_ahead_and_write_behind_give_the_same_training(tmp_path: Path) -> None:
    found = []
    for name, changes in (("a", {}), ("b", {"prefetch_batches": 3, "write_queue": 2})):
        config = with_cache(tmp_path / name, dtype="fp32", pays_below=1e9, **changes)
        loop = make(config, control=lambda plan, steps: StaticFreezing(8, 2))
        loop.run()
        assert loop.kgt.cache is not None
        found.append((weights(loop), loop.kgt.cache.stats.prefetched))
        loop.close()
    assert same(found[0][0], found[1][0])
    assert found[0][1] == 0
    assert found[1][1] > 0


def test_kgt_freezes_logs_and_predicts_a_speedup() -> None:
    log = EventLog()
    loop = make(QUICK, log=log)
    loop.run()
    kinds = {row["event"] for row in log.rows}
    assert {"guided", "reading", "freeze", "applied", "release"} <= kinds
    assert loop.kgt.evaluation_s > 0
    loop.kgt.apply(3)
    assert loop.kgt.status()["predicted_speedup"] > 1.0
    assert loop.kgt.status()["modules"] == 5


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("stop", [3, 11, 17, 29])
def test_resume_is_bit_identical(tmp_path: Path, optimizer: str, stop: int) -> None:
    def fresh(name: str) -> TrainLoop:
        config = with_cache(tmp_path / name, pays_below=1e9)
        return make(config, optimizer)

    whole = fresh("whole")
    whole.run()
    first = fresh("part")
    first.run(until=stop)
    state = first.state_dict()
    torch.save(state, tmp_path / "state.pt")
    first.run(until=stop + 3)  # work after the checkpoint is lost, its cache rows are not
    first.close(keep_cache=True)
    second = fresh("part")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=False))
    second.run()
    assert same(weights(whole), weights(second))
    assert whole.kgt.frozen_upto == second.kgt.frozen_upto
    whole.close()
    second.close()


def test_another_grouping_in_a_checkpoint_is_refused_with_the_difference() -> None:
    state = make(QUICK).state_dict()
    state["kgt"]["signature"][1] = ["blocks.9"]
    with pytest.raises(DataError, match=r"module 1 is \['blocks.9'\] there"):
        make(QUICK).load_state_dict(state)


def test_all_but_the_head_may_freeze() -> None:
    loop = make(None)
    loop.kgt.apply(4)
    loop.run(until=3)
    with pytest.raises(ConfigError, match="the head trains"):
        loop.kgt.apply(5)
    assert loop.kgt.frozen_upto == 4


def test_an_optimizer_that_moves_frozen_parameters_disables_freezing() -> None:
    loop = make(None, control=lambda plan, steps: StaticFreezing(4, 2))

    def meddle(*args: Any) -> None:
        with torch.no_grad():
            loop.model.get_submodule("stem.0").weight.add_(1.0)

    loop.optimizer.register_step_post_hook(meddle)
    loop.run(until=8)
    assert loop.kgt.frozen_upto == 0
    assert any("changed frozen parameters" in note for note in loop.kgt.notes)


def test_lbfgs_is_refused() -> None:
    model = models.ResNet(3, widths=(4, 4), dimensions=1)
    with pytest.raises(ConfigError, match="skips missing gradients"):
        KGT(model, torch.optim.LBFGS(model.parameters()), example=(examples().x,), total_steps=9)


def test_a_second_job_on_the_same_cache_trains_without_it(tmp_path: Path) -> None:
    one, two = make(with_cache(tmp_path)), make(with_cache(tmp_path))
    assert one.kgt.cache is not None
    assert two.kgt.cache is None
    assert any("used by another job" in note for note in two.kgt.notes)
    two.run(until=2)
    one.close()


def test_the_cache_needs_ids() -> None:
    model = models.ResNet(3, widths=(4, 4), dimensions=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    config = KGTConfig(cache=CacheConfig(directory="somewhere"))
    with pytest.raises(ConfigError, match="DataDescription"):
        KGT(model, optimizer, config, example=(examples().x,), total_steps=9)


def test_changed_inputs_turn_the_cache_off_and_training_goes_on(tmp_path: Path) -> None:
    config = with_cache(tmp_path, pays_below=1e9)
    loop = make(config, control=lambda plan, steps: StaticFreezing(1, 2))
    loop.run(until=10)
    loop.data.x.add_(0.5)
    loop.run(until=20)
    assert loop.kgt.cache is not None
    assert "another input than when it was cached" in loop.kgt.cache.off_reason
    assert loop.step == 20
    loop.close()


def test_skipped_steps_and_nan_losses_are_no_readings() -> None:
    offers: list[int] = []
    loop = make(QUICK)
    loop.run(until=8)
    loop.kgt.control.offer = lambda offer: offers.append(offer.step) or True  # type: ignore
    for loss, skipped in ((1.0, True), (float("nan"), False), (1.0, False)):
        while not loop.kgt.wanted():
            loop.kgt.step(1.0)
        loop.kgt(loop.data.x[:8])
        loop.kgt.step(loss, skipped=skipped)
    assert len(offers) == 1


def test_eval_mode_plasticity_leaves_modes_and_buffers_alone() -> None:
    loop = make(dataclasses.replace(QUICK, eval_mode=True))
    loop.run(until=12)
    buffers = {name: value.clone() for name, value in loop.model.named_buffers()}
    modes = [module.training for module in loop.model.modules()]
    loop.kgt._eval_outputs((loop.data.x[:8],), 0, (0, 1))
    assert modes == [module.training for module in loop.model.modules()]
    assert all(torch.equal(buffers[name], value) for name, value in loop.model.named_buffers())


def test_gradient_accumulation_changes_the_prefix_between_optimizer_steps_only() -> None:
    torch.manual_seed(1)
    model = models.ResNet(3, widths=(4, 4, 8), dimensions=1)
    recipe = Recipe(epochs=3, batch_size=8, accumulate=3)
    loop = TrainLoop(model, examples(), recipe, QUICK, control=lambda p, s: StaticFreezing(1, 2))
    assert loop.steps_per_epoch == 2
    loop.run()
    assert loop.step == 6
    assert loop.kgt.frozen_upto == 2


def test_evaluation_runs_the_whole_model() -> None:
    loop = make(None, control=lambda plan, steps: NoFreezing())
    loop.kgt.apply(2)
    accuracy = loop.accuracy(loop.data.x, loop.data.y)
    assert 0.0 <= accuracy <= 1.0
    assert not loop.model.get_submodule("stem.1").training
    assert loop.model.get_submodule("blocks.2").training


class Untraceable(nn.Module):
    """Control flow on data between two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        if float(h.detach().sum()) > 1e6:
            h = h / 2
        out: Tensor = self.head(torch.relu(self.b(h)))
        return out


def test_hooks_mode_freezes_without_a_cache(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Untraceable()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    x, y = torch.randn(16, 4), torch.randint(0, 2, (16,))
    described = DataDescription(ids=np.arange(16), fingerprint="x")
    kgt = KGT(model, optimizer, with_cache(tmp_path), example=(x,), total_steps=60, data=described)
    for _ in range(40):
        loss = functional.cross_entropy(kgt(x, ids=np.arange(16)), y)
        torch.autograd.backward(loss)
        optimizer.step()
        kgt.step(loss)
        optimizer.zero_grad()
    assert kgt.frozen_upto > 0
    assert kgt.cache is None
    assert any("could not be traced" in note for note in kgt.notes)
    assert model.a.weight.grad is None
