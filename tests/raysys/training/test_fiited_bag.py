"""The PyTorch layer: equal to nn.EmbeddingBag where nothing is pruned, and strict about input."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from raysys.errors import ConfigError
from raysys.training.fiited import (
    FiitedConfig,
    FiitedEmbeddingBag,
    TableSpec,
    convert,
    hash_strings,
)

ROWS, DIM = 50, 16


def full_config(**fields: Any) -> FiitedConfig:
    given = {"chunk": 4, "budget_ratio": 0.0, "admit_after": 0, "cadence": "manual", "slack": 0.0}
    return FiitedConfig(**(given | fields))


def pair(optimizer: str, mode: str, **fields: Any) -> tuple[FiitedEmbeddingBag, nn.EmbeddingBag]:
    config = full_config(optimizer=optimizer, lr=0.1, eps=1e-10, **fields)
    ours = FiitedEmbeddingBag([TableSpec(name="t", dim=DIM, rows=ROWS)], config, mode=mode)
    ours(torch.arange(ROWS))
    theirs = nn.EmbeddingBag(ROWS, DIM, mode=mode)
    with torch.no_grad():
        theirs.weight.copy_(torch.from_numpy(ours.store.export_dense("t", np.arange(ROWS))))
    return ours, theirs


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam"])
def test_without_pruning_training_equals_torch(optimizer: str, mode: str) -> None:
    ours, theirs = pair(optimizer, mode)
    rules = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "adam": torch.optim.Adam}
    rule = rules[optimizer](
        theirs.parameters(), lr=0.1, **({"eps": 1e-10} if optimizer != "sgd" else {})
    )
    generator = torch.Generator().manual_seed(1)
    values = torch.arange(ROWS).repeat(2)  # all rows: dense Adam then moves the same ones
    for _ in range(6):
        values = values[torch.randperm(len(values), generator=generator)]
        offsets = torch.tensor([0, 3, 3, 40, 77])
        target = torch.randn(5, DIM, generator=generator)
        losses = []
        for layer in (ours, theirs):
            losses.append(((layer(values, offsets) - target) ** 2).sum())
            losses[-1].backward()
        rule.step()
        rule.zero_grad()
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    mine = torch.from_numpy(ours.store.export_dense("t", np.arange(ROWS)))
    torch.testing.assert_close(mine, theirs.weight.detach(), rtol=1e-5, atol=1e-6)


def test_per_sample_weights_and_their_gradient_equal_torch() -> None:
    ours, theirs = pair("sgd", "sum")
    values, offsets = torch.tensor([1, 2, 2, 7]), torch.tensor([0, 2])
    weights = [torch.tensor([0.5, -1.0, 2.0, 0.0], requires_grad=True) for _ in range(2)]
    outputs = [layer(values, offsets, w) for layer, w in zip((ours, theirs), weights)]
    torch.testing.assert_close(*outputs)
    for out in outputs:
        (out**2).sum().backward()
    torch.testing.assert_close(weights[0].grad, weights[1].grad)
    moved = torch.from_numpy(ours.store.export_dense("t", np.arange(ROWS)))
    torch.testing.assert_close(moved, theirs.weight.detach() - 0.1 * theirs.weight.grad)


def test_two_d_input_and_last_offset_mean_the_same_as_bags() -> None:
    ours, theirs = pair("sgd", "mean")
    values = torch.tensor([[1, 2], [3, 3]])
    torch.testing.assert_close(ours(values), theirs(values))
    config = full_config()
    both = FiitedEmbeddingBag(
        [TableSpec(name="t", dim=DIM, rows=ROWS)], config, include_last_offset=True
    )
    out = both(torch.tensor([1, 2, 3]), torch.tensor([0, 2, 3]))
    assert out.shape == (2, DIM)


def tables_of(count: int, **fields: Any) -> FiitedEmbeddingBag:
    tables = [TableSpec(name=f"t{i}", dim=DIM, rows=ROWS) for i in range(count)]
    return FiitedEmbeddingBag(tables, full_config(lr=0.1), **fields)


@pytest.mark.parametrize("case", ["one id a bag", "weights", "bags", "bags with an end", "numpy"])
def test_one_array_of_all_tables_means_the_same_as_a_list(case: str) -> None:
    end = case == "bags with an end"
    layers = [tables_of(2, include_last_offset=end) for _ in range(2)]
    values = [torch.tensor([1, 2, 2, 7]), torch.tensor([3, 3, 2, 9])]
    offsets = [torch.tensor([0, 0, 3]), torch.tensor([0, 1, 3])]
    weights = [torch.tensor([0.5, -1.0, 2.0, 0.0]), torch.tensor([1.0, 3.0, 0.5, 2.0])]
    flat = torch.cat(values)
    listed: tuple[Any, ...] = (values,)
    joined: tuple[Any, ...] = (flat.numpy() if case == "numpy" else flat,)
    if case == "weights":
        listed, joined = (values, None, weights), (flat, None, torch.cat(weights))
    if case == "bags":
        listed, joined = (values, offsets), (flat, torch.cat([offsets[0], offsets[1] + 4]))
    if end:
        ends = torch.tensor([4])
        listed = (values, [torch.cat([cuts, ends]) for cuts in offsets])
        joined = (flat, torch.cat([offsets[0], offsets[1] + 4, ends + 4]))
    for _ in range(3):
        outputs = [layers[0](*listed), layers[1](*joined)]
        torch.testing.assert_close(*outputs, rtol=0, atol=0)
        assert outputs[0].abs().sum() > 0
        for out in outputs:
            (out**2).sum().backward()


@pytest.mark.parametrize(
    ("size", "offsets", "match"),
    [
        (5, None, "as many ids for each of 2 tables"),
        (4, [0, 1, 2], "as many bags for each of 2 tables"),
        (4, [1, 2, 3, 4], "a first offset of 0"),
        (4, [0, 3, 9, 9], "non-decreasing"),
        (4, [0, 3, 2, 4], r"offsets\[0\]"),
        (4, [0.0, 1.0], "integers"),
    ],
)
def test_one_array_that_is_no_batch_is_refused(size: int, offsets: Any, match: str) -> None:
    layer = tables_of(2)
    with pytest.raises(ConfigError, match=match):
        layer(torch.arange(size), None if offsets is None else torch.tensor(offsets))
    with pytest.raises(ConfigError, match="ids of t1"):
        layer(torch.tensor([1, 2, 3, -4]))
    assert layer.stats()["rows"] == 0


def test_bfloat_gradients_are_accepted() -> None:
    ours, _ = pair("sgd", "sum")
    before = ours.store.export_dense("t", np.array([4]))
    (ours(torch.tensor([4])).to(torch.bfloat16) * 2).sum().backward()
    np.testing.assert_allclose(ours.store.export_dense("t", np.array([4])), before - 0.2, rtol=1e-6)


def test_backward_twice_is_an_error() -> None:
    ours, _ = pair("sgd", "sum")
    out = ours(torch.tensor([1])).sum()
    out.backward(retain_graph=True)
    with pytest.raises(ConfigError, match="one backward per lookup"):
        out.backward()


def test_evaluation_changes_nothing_and_strangers_are_zero() -> None:
    config = full_config(budget_ratio=0.5)
    layer = FiitedEmbeddingBag([TableSpec(name="t", dim=DIM, rows=ROWS)], config).eval()
    out = layer(torch.tensor([2**62, 5]))
    assert torch.count_nonzero(out) == 0
    assert layer.stats()["rows"] == 0
    assert layer.stats()["lookups"] == 0


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        (torch.tensor([1.0]), "1-d integer"),
        (torch.tensor([True]), "1-d integer"),
        (np.array(["a"]), "hash_strings"),
        (torch.tensor([3, -1]), "position 1"),
    ],
)
def test_wrong_ids_are_refused_by_name(ids: Any, match: str) -> None:
    ours, _ = pair("sgd", "sum")
    with pytest.raises(ConfigError, match=match):
        ours(ids)


@pytest.mark.parametrize(
    "offsets",
    [[1, 2], [0, 3, 2], [0, 9], [[0]], [0.0]],
    ids=["start", "order", "end", "2d", "float"],
)
def test_wrong_offsets_are_refused(offsets: list[Any]) -> None:
    ours, _ = pair("sgd", "sum")
    with pytest.raises(ConfigError, match=r"offsets\[0\]"):
        ours(torch.arange(4), torch.tensor(offsets))


def test_wrong_weights_and_gradient_are_refused() -> None:
    ours, _ = pair("sgd", "sum")
    ids, offsets = torch.tensor([1, 2]), torch.tensor([0])
    with pytest.raises(ConfigError, match="finite weights"):
        ours(ids, offsets, torch.tensor([1.0, float("nan")]))
    with pytest.raises(ConfigError, match="per_sample_weights"):
        ours(ids, offsets, torch.tensor([1.0]))
    _, batch = ours.store.lookup([np.array([1])], train=True)
    with pytest.raises(ConfigError, match="gradient"):
        ours.store.update(batch, np.zeros((1, DIM + 1), np.float32))


def test_empty_batches_and_bags_give_zeros() -> None:
    ours, _ = pair("sgd", "mean")
    assert ours(torch.empty(0, dtype=torch.int64)).shape == (0, DIM)
    out = ours(torch.tensor([3]), torch.tensor([0, 0, 1]))
    assert torch.count_nonzero(out[0]) == 0
    assert torch.count_nonzero(out[2]) == 0
    out.sum().backward()
    assert np.isfinite(ours.store.export_dense("t", np.array([3]))).all()


def test_convert_replaces_tables_and_the_model_still_learns() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.items = nn.EmbeddingBag(100, 8, mode="sum")
            self.users = nn.Embedding(100, 8)
            self.head = nn.Linear(16, 1)

        def forward(self, items: torch.Tensor, users: torch.Tensor) -> torch.Tensor:
            both = torch.cat([self.items(items), self.users(users)], 1)
            return self.head(both).squeeze(1)

    torch.manual_seed(0)
    model = convert(Model(), FiitedConfig(chunk=4, budget_ratio=0.5, optimizer="adagrad", lr=0.2))
    assert not [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    items, users = torch.randint(0, 20, (256, 2)), torch.randint(0, 20, (256,))
    labels = (users % 2).float()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        loss = nn.functional.binary_cross_entropy_with_logits(model(items, users), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]
    with pytest.raises(ConfigError, match="multiple of 4"):
        convert(nn.Sequential(nn.Embedding(5, 6)), FiitedConfig(chunk=4, budget_ratio=0.5))


def test_live_layers_do_not_pickle_and_strings_hash_stably() -> None:
    ours, _ = pair("sgd", "sum")
    with pytest.raises(ConfigError, match="pickling"):
        pickle.dumps(ours.store)
    assert hash_strings(["a", "b", "a"])[0] == hash_strings(["a"])[0]
    assert hash_strings(["a"])[0] >= 0
