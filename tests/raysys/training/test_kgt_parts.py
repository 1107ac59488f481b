"""Plasticity, reference precision, the cache's files, sampling, baselines, the event log."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from raysys.errors import CapabilityError, ConfigError, DataError, StorageError
from raysys.training.kgt import models, quantise
from raysys.training.kgt.baselines import (
    GradientCriterion,
    LinearSchedule,
    Replay,
    StaticFreezing,
    schedule_of,
)
from raysys.training.kgt.cache import ActivationCache
from raysys.training.kgt.config import CacheConfig
from raysys.training.kgt.distributed import DistributedControl
from raysys.training.kgt.events import EventLog, frozen_share, read_events, timeline
from raysys.training.kgt.plan import parse
from raysys.training.kgt.plasticity import gram, sp_loss, subsample
from raysys.training.kgt.reference import SegmentReference
from raysys.training.kgt.sampling import (
    ShardStableSampler,
    apply_view,
    cache_ids,
    check_repeatable,
    view_of,
)
from raysys.training.kgt.store import BoundaryStore, StoreKey


def test_gram_and_loss_by_hand() -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    b = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert torch.allclose(gram(a), torch.eye(2), atol=1e-6)
    # b: Gram all ones, rows divided by sqrt(2). Differences 1 - s, s, s, 1 - s over four entries.
    s = 2**-0.5
    assert sp_loss(gram(a), gram(b)) == pytest.approx((2 * (1 - s) ** 2 + 2 * s**2) / 4, rel=1e-5)
    assert sp_loss(gram(a), gram(3 * a)) == pytest.approx(0.0, abs=1e-12)


@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 99))
def test_loss_is_symmetric_bounded_and_blind_to_scale(rows: int, width: int, seed: int) -> None:
    one, two = torch.randn(2, rows, width, generator=torch.Generator().manual_seed(seed))
    loss = sp_loss(gram(one), gram(two))
    assert loss is not None
    assert 0 <= loss <= 4 / rows + 1e-6
    assert loss == pytest.approx(sp_loss(gram(two), gram(one)))
    assert loss == pytest.approx(sp_loss(gram(5 * one), gram(two)), abs=1e-6)


def test_readings_without_meaning_are_none() -> None:
    assert sp_loss(gram(torch.ones(1, 3)), gram(torch.ones(1, 3))) is None
    assert sp_loss(gram(torch.ones(2, 3)), gram(torch.ones(3, 3))) is None
    assert sp_loss(gram(torch.full((2, 3), float("nan"))), gram(torch.ones(2, 3))) is None
    assert sp_loss(gram(torch.zeros(2, 3)), gram(torch.zeros(2, 3))) == 0.0
    assert subsample(100, 64) == slice(0, 64)


def chain() -> tuple[list[nn.Module], Tensor]:
    torch.manual_seed(0)
    model = models.ResNet(3, widths=(4, 8), dimensions=2)
    x = torch.randn(8, 1, 8, 8)
    plan = parse(model, (x,), modules=16)
    model.eval()
    return [module.segment for module in plan.modules[:-1] if module.segment is not None], x


@pytest.mark.parametrize("precision", ["fx_int8", "bf16", "fp32"])
def test_every_precision_agrees_with_fp32_gram_matrices(precision: str) -> None:
    segments, x = chain()
    reference = SegmentReference(precision)
    reference.build(dict(enumerate(segments)), (x,), None)
    wanted = list(range(len(segments)))
    found = reference.grams((x,), None, 0, wanted)
    assert reference.precision == precision, reference.notes
    value: Any = None
    with torch.no_grad():
        for index, segment in enumerate(segments):
            value = segment(value, x)
            error = float((found[index] - gram(value)).norm() / gram(value).norm())
            assert error < (1e-6 if precision == "fp32" else 0.05)


def test_a_precision_that_fails_falls_back_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> nn.Module:
        raise RuntimeError("no kernel for this operation")

    monkeypatch.setattr(quantise, "_static_int8", broken)
    monkeypatch.setattr(quantise, "_fast_bf16", lambda: False)
    segments, x = chain()
    reference = SegmentReference("fx_int8")
    reference.build(dict(enumerate(segments)), (x,), None)
    assert reference.precision == "fp32"
    assert "no kernel for this operation" in reference.notes[0]
    assert reference.grams((x,), None, 0, [0])


def test_auto_counts_the_build_cost_over_the_period() -> None:
    segments, x = chain()
    precision, trials = quantise.choose(segments, (x,), None, evaluations=3)
    best = min(trials, key=lambda t: t.build_s + 3 * t.run_s if t.error < 0.05 else 1e9)
    assert precision == best.precision
    assert {trial.precision for trial in trials} >= {"fp32", "fx_int8"}


def test_linear_layers_quantise_dynamically() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(4, 8)
    made = quantise.convert(module, "dynamic_int8", ())
    assert quantise.candidates([module])[0] == "dynamic_int8"
    assert torch.allclose(made(x), module(x).detach(), atol=0.1)
    assert not torch.equal(made(x), module(x).detach())


def test_the_reference_is_a_snapshot_and_covers_only_what_was_built() -> None:
    segments, x = chain()
    reference = SegmentReference("fp32")
    reference.build({0: segments[0]}, (x,), None)
    before = reference.grams((x,), None, 0, [0])[0]
    with torch.no_grad():
        next(segments[0].parameters()).add_(torch.randn(1))
    assert torch.equal(before, reference.grams((x,), None, 0, [0])[0])
    assert reference.grams((x,), None, 0, [1]) == {}
    copy = SegmentReference("fp32")
    copy.load_state_dict(reference.state_dict(), dict(enumerate(segments)))
    assert torch.equal(before, copy.grams((x,), None, 0, [0])[0])


def key(**changes: Any) -> StoreKey:
    base: dict[str, Any] = {
        "boundary": 1, "version": 0, "shape": (2, 3), "dtype": "fp32", "fingerprint": "a",
    }  # fmt: skip
    return StoreKey(**{**base, **changes})


def test_rows_come_back_and_only_written_ones_are_hits(tmp_path: Path) -> None:
    ids = np.array([3, 8, 10**12], np.int64)
    store = BoundaryStore(tmp_path, key(), ids)
    rows = torch.arange(6.0).reshape(1, 2, 3)
    store.write(store.slots(np.array([8])), rows)
    slots = store.slots(np.array([3, 8, 9, 10**12]))
    assert slots.tolist() == [0, 1, -1, 2]
    assert store.hits(slots).tolist() == [False, True, False, False]
    assert torch.equal(store.read(slots[1:2]), rows)
    again = BoundaryStore(tmp_path, key(), ids)
    assert again.hits(slots).tolist() == [False, True, False, False]


@pytest.mark.parametrize("changes", [{"fingerprint": "b"}, {"augmentation": "flip"}])
def test_rows_of_another_data_set_are_dropped(tmp_path: Path, changes: dict[str, Any]) -> None:
    ids = np.arange(4)
    one = BoundaryStore(tmp_path, key(), ids)
    one.write(np.array([0]), torch.ones(1, 2, 3))
    two = BoundaryStore(tmp_path, key(**changes), ids)
    assert not two.hits(np.array([0])).any()


def test_a_full_disk_is_an_error_that_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match="No space left"):
        BoundaryStore(tmp_path, key(), np.arange(4))
    assert not list(tmp_path.glob("boundary*"))


def test_a_full_disk_turns_the_cache_off_and_rows_are_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cache = ActivationCache(CacheConfig(directory=str(tmp_path)), np.arange(4), "a")
    cache.move(1)
    monkeypatch.setattr(os, "posix_fallocate", full)
    x = torch.ones(4, 2)
    out = cache.gather(np.arange(4), [x], lambda inputs, upto, h, start: 2 * inputs[0])
    assert torch.equal(out, 2 * x)
    assert "No space left" in cache.off_reason
    cache.close()
    cache.close()


def test_fp16_overflow_changes_the_precision_of_that_boundary(tmp_path: Path) -> None:
    cache = ActivationCache(CacheConfig(directory=str(tmp_path)), np.arange(4), "a")
    cache.move(1)
    x = torch.full((4, 2), 1e6)
    for _ in range(2):
        out = cache.gather(np.arange(4), [x], lambda inputs, upto, h, start: inputs[0])
        assert torch.isfinite(out).all()
        assert float(out[0, 0]) == pytest.approx(1e6, rel=0.01)
    cache.close()


def test_unfreezing_forgets_and_the_directory_is_free_after_closing(tmp_path: Path) -> None:
    config = CacheConfig(directory=str(tmp_path), pays_below=1e9)
    cache = ActivationCache(config, np.arange(4), "a")
    compute: Any = lambda inputs, upto, h, start: inputs[0]  # noqa: E731
    cache.move(2)
    cache.gather(np.arange(4), [torch.ones(4, 2)], compute)
    cache.gather(np.arange(4), [torch.ones(4, 2)], compute)
    assert cache.stats.hits == 4
    cache.move(1)
    assert cache.used_bytes == 0
    cache.gather(np.arange(4), [torch.ones(4, 2)], compute)
    assert cache.stats.misses == 8
    with pytest.raises(StorageError, match="used by another job"):
        ActivationCache(config, np.arange(4), "a")
    cache.close()
    ActivationCache(config, np.arange(4), "a").close()
    assert not list(tmp_path.glob("boundary*"))


def test_a_cache_that_does_not_pay_is_paused(tmp_path: Path) -> None:
    ticks = iter(range(1000))
    config = CacheConfig(directory=str(tmp_path), pays_below=0.8)
    cache = ActivationCache(config, np.arange(8), "a", clock=lambda: float(next(ticks)))
    cache.move(1)
    for start in (0, 2, 4):
        ids = np.arange(start, start + 2)
        cache.gather(ids, [torch.ones(2, 2)], lambda inputs, upto, h, at: inputs[0])
    assert not cache.active
    cache.close()


def test_shards_are_disjoint_stable_and_shuffled() -> None:
    samplers = [ShardStableSampler(103, rank=rank, world=4, seed=7) for rank in range(4)]
    shards = [set(s.shard(0).tolist()) for s in samplers]
    assert sum(map(len, shards)) == len(set.union(*shards)) == 100
    assert set(samplers[1].order(5).tolist()) == shards[1]
    assert samplers[1].order(5).tolist() != samplers[1].order(6).tolist()
    dealt = ShardStableSampler(103, rank=1, world=4, seed=7, reshard_every=2)
    assert set(dealt.shard(1).tolist()) == shards[1]
    assert set(dealt.shard(2).tolist()) != shards[1]
    with pytest.raises(ConfigError, match="rank"):
        ShardStableSampler(10, rank=4, world=4)


def test_views_repeat_and_random_transforms_are_found_out() -> None:
    x, ids = torch.zeros(3, 4), np.array([5, 6, 7])

    def good(row: Tensor, rng: np.random.Generator) -> Tensor:
        return row + float(rng.standard_normal())

    def bad(row: Tensor, rng: np.random.Generator) -> Tensor:
        return row + torch.rand(1)

    one = apply_view(good, x, ids, 1, 0)
    assert torch.equal(one, apply_view(good, x, ids, 1, 0))
    assert not torch.equal(one, apply_view(good, x, ids, 1, 1))
    check_repeatable(good, x, ids, 1)
    with pytest.raises(ConfigError, match="repeatable"):
        check_repeatable(bad, x, ids, 1)
    assert [view_of(epoch, "k_views", 3) for epoch in range(4)] == [0, 1, 2, 0]
    assert view_of(9, "fixed", 3) == 0
    assert cache_ids(ids, 1, 3).tolist() == [16, 19, 22]
    with pytest.raises(ConfigError, match="view_policy"):
        view_of(1, "some", 2)


def play(control: Any, epochs: int, per_epoch: int = 10) -> list[int]:
    found = []
    for step in range(epochs * per_epoch):
        control.observe(step, 1.0, 0.1, step // per_epoch)
        if (step + 1) % per_epoch == 0:
            found.append(control.latest().frozen_upto)
    return found


def test_linear_schedule_grows_from_its_start_and_spares_the_head() -> None:
    upto = play(LinearSchedule(0.5, 1.0, 6, 100), 10)
    assert upto[:6] == [0] * 6
    assert upto == sorted(upto)
    assert upto[-1] == 4  # seen at the end of the ninth epoch: share 0.82 of six
    assert max(play(LinearSchedule(0.0, 1.0, 6, 50), 10)) == 5


def test_static_and_replay() -> None:
    assert play(StaticFreezing(25, 2), 4) == [0, 0, 2, 2]
    assert play(Replay([(5, 1), (12, 3), (30, 0)]), 4) == [1, 3, 0, 0]
    with pytest.raises(ConfigError, match="ascending"):
        Replay([(5, 1), (3, 2)])
    assert schedule_of([{"event": "applied", "step": 4, "upto": 1}, {"event": "guided"}]) == [
        (4, 1)
    ]


def test_gradient_criterion_freezes_up_to_the_first_that_still_changes() -> None:
    control = GradientCriterion(1, 4)
    modules = [[nn.Parameter(torch.zeros(1))] for _ in range(4)]
    for step, norms in enumerate(([8.0, 8.0, 8.0, 8.0], [7.9, 7.8, 4.0, 2.0])):
        for (parameter,), norm in zip(modules, norms):
            parameter.grad = torch.tensor([norm])
        control.gradients(step, modules)
    # Changes .0125, .025, .5, .75: the median is .2625, so modules 0 and 1 freeze.
    assert control.latest().frozen_upto == 2
    other = GradientCriterion(1, 4)
    other.load_state_dict(control.state_dict())
    assert other.latest() == control.latest()


class Scripted(LinearSchedule):
    """Freezes one module from step 4 on."""

    def __init__(self) -> None:
        super().__init__(0.0, 1.0, 3, 10)

    def observe(self, step: int, loss: float, rate: float, epoch: int) -> None:
        if step == 4:
            self.decide(1, step, "script")


def test_all_ranks_switch_at_the_same_step() -> None:
    box: list[Tensor] = []

    def send(value: Tensor) -> None:
        box.append(value.clone())

    def receive(value: Tensor) -> None:
        value.copy_(box[-1])

    zero = DistributedControl(Scripted(), 0, every=3, broadcast=send)
    one = DistributedControl(None, 1, every=3, broadcast=receive)
    seen = []
    for step in range(9):
        for control in (zero, one):
            control.observe(step, 1.0, 0.1, 0)
        seen.append((zero.latest().frozen_upto, one.latest().frozen_upto))
        assert zero.latest().effective_step == one.latest().effective_step
    assert seen == [(0, 0)] * 5 + [(1, 1)] * 4
    assert one.latest().effective_step == 6


def test_ranks_out_of_step_abort_the_switch_and_not_the_job() -> None:
    one = DistributedControl(
        None, 1, every=1, broadcast=lambda value: value.copy_(torch.tensor([1, 2, 7]))
    )
    one.observe(6, 1.0, 0.1, 0)
    assert one.latest().frozen_upto == 0
    assert one.aborted == 1
    one.observe(7, 1.0, 0.1, 0)
    assert one.latest().frozen_upto == 2
    with pytest.raises(ConfigError, match="rank 0"):
        DistributedControl(None, 0)


def test_event_log_survives_a_torn_line_and_resumes_without_doubles(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    for step in range(4):
        log({"event": "reading", "step": step})
    with path.open("a") as file:
        file.write('{"event": "rea')
    assert [row["step"] for row in read_events(path)] == [0, 1, 2, 3]
    again = EventLog(path)
    again.resume(2)
    assert [row["step"] for row in read_events(path)] == [0, 1]
    path.write_text('x\n{"event": "a"}\n')
    with pytest.raises(DataError, match="line 1"):
        read_events(path)
    with pytest.raises(StorageError):
        read_events(tmp_path / "none")


def test_timeline_and_frozen_share() -> None:
    events = [
        {"event": "applied", "step": 25, "upto": 2},
        {"event": "applied", "step": 75, "upto": 0},
    ]
    assert frozen_share(events, 3, 100) == [0.5, 0.5, 0.0]
    lines = list(timeline(events, 3, 100))
    assert lines[0].count("#") == 30
    assert lines[2].count("#") == 0


def test_models_reject_bad_shapes() -> None:
    with pytest.raises(ConfigError, match="dimensions"):
        models.ResNet(2, dimensions=3)
    with pytest.raises(ConfigError, match="heads"):
        models.EncoderBlock(10, 4, 0.0)
    with pytest.raises(ConfigError, match="widths"):
        models.ResNet(2, widths=())


def test_a_model_that_cannot_be_copied_is_a_missing_capability() -> None:
    class Locked(nn.Linear):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("cannot pickle a lock")

    with pytest.raises(CapabilityError, match="cannot be copied"):
        SegmentReference("fp32").build({0: Locked(2, 2)}, (torch.ones(2, 2),), None)
