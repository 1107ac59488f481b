"""Shards by direct calls: one result for any number, repeats, refusals, restore and re-sharding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raysys.errors import ConfigError, DataError, RemoteError
from raysys.training.fiited import FiitedConfig, TableSpec
from raysys.training.fiited.sharding import (
    BucketMap,
    LocalTransport,
    Refusal,
    Reply,
    Request,
    ShardConfig,
    ShardCore,
    ShardedEmbedding,
)
from raysys.training.fiited.sharding.embedding import run_round
from raysys.training.fiited.sharding.messages import from_wire, to_wire

TABLES = (TableSpec(name="a", dim=16, rows=400), TableSpec(name="b", dim=16, rows=90))


def config(**fields: Any) -> FiitedConfig:
    given = {"chunk": 4, "budget_slots": 150, "cadence": "interval", "interval": 7, "seed": 5}
    return FiitedConfig(**{**given, "page_bytes": 65536, **fields})


def cores(shards: int, workers: int = 1, wire: Any = "fp32", **fields: Any) -> list[ShardCore]:
    buckets = BucketMap.even(shards)
    return [
        ShardCore(
            config(**fields),
            TABLES,
            ShardConfig(index=i, shards=shards, workers=workers, wire=wire),
            buckets.owned(i),
        )
        for i in range(shards)
    ]


def batches(steps: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [
        np.stack([np.minimum(rng.zipf(1.2, 64), t.rows) for t in TABLES], 1) for _ in range(steps)
    ]


def embedding(made: list[ShardCore], **fields: Any) -> ShardedEmbedding:
    wire = made[0].shard.wire
    layer = ShardedEmbedding(
        config(**fields), TABLES, BucketMap.even(len(made)), LocalTransport(made), wire=wire
    )
    return layer.train()


def train(layer: ShardedEmbedding, data: list[np.ndarray]) -> list[np.ndarray]:
    outputs = []
    for ids in data:
        out = layer(torch.from_numpy(ids))
        (
            out * torch.sin(torch.arange(out.numel()).reshape(out.shape) + out.detach())
        ).sum().backward()
        outputs.append(out.detach().numpy().copy())
    return outputs


def state(made: list[ShardCore]) -> dict[tuple[int, int], bytes]:
    """Every resident row: weights, utilities and clock, whichever shard holds it."""
    found = {}
    for core in made:
        core.store.verify()
        entries, utils, values = core.store.engine.export()
        lengths = np.bitwise_count(entries["alive"]).astype(int) * 4
        pieces = np.split(values, np.cumsum(lengths)[:-1])
        for entry, util, piece in zip(entries, utils, pieces):
            clock = entry[["acc", "alive", "grown", "touched", "updates"]].tobytes()
            found[int(entry["key"]), int(entry["table"])] = piece.tobytes() + util.tobytes() + clock
    return found


@pytest.mark.parametrize("shards", [2, 3])
@pytest.mark.parametrize(
    "fields", [{"utility": "freq_grad"}, {"utility": "saliency"}, {"weights": "bf16"}]
)
def test_any_number_of_shards_gives_the_same_bits(shards: int, fields: dict[str, str]) -> None:
    data = batches(40)
    one, many = cores(1, **fields), cores(shards, **fields)
    first, second = embedding(one), embedding(many)
    for mine, theirs in zip(train(first, data), train(second, data)):
        assert np.array_equal(mine, theirs)
    first.finish()
    second.finish()
    assert state(one) == state(many)
    grown = one[0].store.engine.counters()
    assert grown["evicted"] > 0
    assert grown["round"] >= 5
    assert sum(core.alive() for core in many) <= 150


def test_shards_agree_with_the_store_in_one_process() -> None:
    from raysys.training.fiited import FiitedStore

    made = cores(2, admit_after=1)
    layer = embedding(made, admit_after=1)
    store = FiitedStore(config(admit_after=1), TABLES, engine="native")
    for ids in batches(20):
        out = layer(torch.from_numpy(ids))
        local, batch = store.lookup(list(ids.T), train=True)
        np.testing.assert_allclose(out.detach().numpy(), local, rtol=2e-3, atol=1e-4)
        grad = np.sin(np.arange(local.size, dtype=np.float32)).reshape(local.shape)
        store.update(batch, grad)
        store.end_step()
        out.backward(torch.from_numpy(grad))


def test_two_workers_in_any_order_equal_their_sum() -> None:
    results = []
    for order in ([0, 1], [1, 0]):
        made = cores(1, workers=2)
        core = made[0]
        layers = [
            ShardedEmbedding(config(), TABLES, BucketMap.even(1), _Never(), worker=w).train()
            for w in (0, 1)
        ]
        for step, ids in enumerate(batches(15)):
            halves = np.split(ids, 2)
            staged = {}
            for worker in order:
                layer = layers[worker]
                layer.keep_gradients()
                routed = layer.router.route(list(halves[worker].T))
                request = layer._request(routed, np.arange(len(routed.keys)), 0)
                assert request.step == step
                staged[worker] = (routed, request)
                assert core.stage(request) is None
            assert core.ready
            if core.apply():
                run_round([core])
            for worker, reply in core.answer().items():
                _take(layers[worker], staged[worker][0], reply, halves[worker])
        results.append(state(made))
    assert results[0] == results[1]


def test_a_repeated_push_is_applied_once_and_gets_the_same_reply() -> None:
    made = cores(1)
    sent: list[Request] = []
    layer = embedding(made)
    inner = layer.transport

    class Twice(LocalTransport):
        def exchange(self, requests: Any, recover: Any) -> Any:
            first = inner.exchange(requests, recover)
            again = inner.exchange(requests, recover)  # the reply was lost: the caller repeats
            sent.extend(requests)
            for one, other in zip(first, again):
                assert isinstance(one, Reply)
                assert isinstance(other, Reply)
                assert np.array_equal(one.values, other.values)
            return again

    layer.transport = Twice(made)
    data = batches(12)
    train(layer, data)
    plain = cores(1)
    train(embedding(plain), data)
    assert state(made) == state(plain)
    assert made[0].counters["repeats"] == 12
    late = made[0].stage(sent[3])
    assert isinstance(late, Refusal)
    assert late.reason == "stale"
    future = replace(sent[-1], step=99)
    assert made[0].stage(future) == Refusal("behind", 11)
    assert made[0].stage(replace(sent[-1], step=12, epoch=4)) == Refusal("epoch", 0)


def test_a_push_for_a_foreign_bucket_is_refused() -> None:
    made = cores(2)
    keys = np.array([1 << 63, 0], np.uint64)
    request = Request(0, 0, 0, keys, np.zeros(2, np.uint16), None, 0.1, 1.0)
    answer = made[0].stage(request)
    assert isinstance(answer, Refusal)
    assert answer.reason == "rows"


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2), (2, 1)])
def test_reload_with_another_number_of_shards_continues_exactly(
    tmp_path: Path, before: int, after: int
) -> None:
    data = batches(40, seed=3)
    whole = cores(before)
    layer = embedding(whole)
    train(layer, data[:18])
    layer.keep_gradients()
    pending = layer.pending
    assert pending is not None
    folders = [tmp_path / str(i) for i in range(before)]
    for core, folder in zip(whole, folders):
        core.snapshot().write(folder)
    moved = cores(after)
    for core in moved:
        core.restore(folders)
    total = sum(core.alive() for core in moved)
    assert total == sum(core.alive() for core in whole)
    for core in moved:
        core.set_elsewhere(total - core.alive())
    resumed = embedding(moved)
    resumed.exchanges = 17  # the last exchange again: its rows are pulled from the restored state
    train(resumed, data[17:])
    train(layer, data[18:])
    layer.finish()
    resumed.finish()
    assert state(whole) == state(moved)


def test_shards_of_different_saves_do_not_mix(tmp_path: Path) -> None:
    made = cores(2)
    layer = embedding(made)
    train(layer, batches(3))
    made[0].snapshot().write(tmp_path / "0")
    train(layer, batches(2))
    made[1].snapshot().write(tmp_path / "1")
    with pytest.raises(DataError, match="steps"):
        cores(1)[0].restore([tmp_path / "0", tmp_path / "1"])


def test_what_several_shards_cannot_share_is_refused() -> None:
    for fields in ({"admit_after": 0}, {"scope": "table"}):
        with pytest.raises(ConfigError):
            cores(2, **fields)
    with pytest.raises(ConfigError):
        cores(2, budget_slots=None, budget_bytes=2**24)
    with pytest.raises(RemoteError):
        LocalTransport([]).exchange_one(0, None)  # type: ignore[arg-type]


def test_continuous_cadence_keeps_quotas() -> None:
    made = cores(2, cadence="continuous", interval=10)
    train(embedding(made, cadence="continuous"), batches(40))
    for core in made:
        core.store.verify()
        assert core.alive() <= 75


def test_bf16_wire_halves_values_and_still_learns() -> None:
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    np.testing.assert_allclose(from_wire(to_wire(values, "bf16")), values, rtol=2**-8)
    assert np.isnan(from_wire(to_wire(np.array([np.nan], np.float32), "bf16"))).all()
    made = cores(1, wire="bf16")
    layer = embedding(made)
    full = cores(1)
    wide = embedding(full)
    data = batches(20)
    train(layer, data)
    train(wide, data)
    assert layer.wire_bytes["in"] < 0.7 * wide.wire_bytes["in"]


def test_hot_buckets_move_until_the_load_is_even() -> None:
    loads = np.ones(4096)
    loads[:40] = 200.0
    even = BucketMap.even(2)
    moved = even.balanced(loads)
    totals = np.bincount(moved.owners, weights=loads)
    assert moved.epoch == 1
    assert totals.max() <= 1.25 * totals.mean()
    assert even.balanced(np.ones(4096)) is even


class _Never:
    """A transport that must not be used."""

    def exchange(self, requests: Any) -> Any:
        raise AssertionError

    def exchange_one(self, shard: int, request: Any) -> Any:
        raise AssertionError


def _take(layer: ShardedEmbedding, routed: Any, reply: Reply, ids: np.ndarray) -> None:
    """What ``begin`` does with a reply, then a made-up gradient."""
    step = layer.rows_of(routed, [np.arange(len(routed.keys))], [reply])
    layer.exchanges += 1
    layer.pending = None
    step.rows.grad = torch.sin(torch.arange(step.rows.numel(), dtype=torch.float32)).reshape(
        step.rows.shape
    ) + float(ids.sum() % 7)
