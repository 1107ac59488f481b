"""The batched kernels against their reference twins: a plain autograd loop per client."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from raysys.ops import batched_embedding_bag, batched_mlp
from raysys.ops.kernels import load_kernel

RAGGED = [7, 7, 5, 3, 1]  # steps of five clients
OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"weight_decay": 0.01},
    {"prox_mu": 0.5},
    {"momentum": 0.5, "weight_decay": 0.01, "prox_mu": 0.1},
]


def make_batches(
    n: int, steps: list[int], width: int
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    clients = len(steps)
    index = torch.randint(0, n, (steps[0], clients, width))
    scale = torch.full((steps[0], clients, width), 1.0 / width)
    scale[-1] = 0.0
    scale[-1, :, : width - 1] = 1.0 / (width - 1)  # a short last batch
    active = [sum(own > step for own in steps) for step in range(steps[0])]
    return index, scale, active


def relative_gap(ours: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, other))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sizes", [(6, 3), (6, 8, 3), (6, 8, 5, 3)], ids=str)
@pytest.mark.parametrize("with_drift", [False, True])
def test_mlp_kernel_equals_the_loop(
    options: dict[str, Any], sizes: tuple[int, ...], with_drift: bool
) -> None:
    torch.manual_seed(1)
    shapes = [shape for i, o in pairwise(sizes) for shape in ((5, o, i), (5, o))]
    start = [torch.randn(shape) * 0.3 for shape in shapes]
    drift = [torch.randn(shape) * 0.01 for shape in shapes] if with_drift else None
    x, y = torch.randn(40, sizes[0]), torch.randint(0, sizes[-1], (40,))
    batches = make_batches(40, RAGGED, 4)
    ours, other = [p.clone() for p in start], [p.clone() for p in start]
    kernel = load_kernel("batched_mlp")
    found = kernel.train(ours, x, y, *batches, lr=0.1, drift=drift, **options)
    expected = batched_mlp.train(other, x, y, *batches, lr=0.1, drift=drift, **options)
    assert relative_gap(ours, other) < 1e-5
    for mine, theirs in zip(found, expected):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert all((a != b).any() for a, b in zip(ours, start))


def test_mlp_kernel_on_regression() -> None:
    torch.manual_seed(2)
    start = [torch.randn(5, 8, 1), torch.randn(5, 8), torch.randn(5, 2, 8) * 0.3, torch.zeros(5, 2)]
    x, y = torch.randn(40, 1), torch.randn(40, 2)
    batches = make_batches(40, RAGGED, 4)
    ours, other = [p.clone() for p in start], [p.clone() for p in start]
    found = load_kernel("batched_mlp").train(ours, x, y, *batches, lr=0.05, regression=True)
    expected = batched_mlp.train(other, x, y, *batches, lr=0.05, regression=True)
    assert relative_gap(ours, other) < 1e-5
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("with_drift", [False, True])
def test_embedding_bag_kernel_equals_the_loop(options: dict[str, Any], with_drift: bool) -> None:
    torch.manual_seed(3)
    shapes = [(5, 11, 4), (5, 3, 4), (5, 3)]
    start = [torch.randn(shape) * 0.5 for shape in shapes]
    drift = [torch.randn(shape) * 0.01 for shape in shapes] if with_drift else None
    tokens, y = torch.randint(0, 11, (40, 6)), torch.randint(0, 3, (40,))
    batches = make_batches(40, RAGGED, 4)
    ours, other = [p.clone() for p in start], [p.clone() for p in start]
    kernel = load_kernel("batched_embedding_bag")
    found = kernel.train(ours, tokens, y, *batches, lr=0.1, drift=drift, **options)
    expected = batched_embedding_bag.train(
        other, tokens, y, *batches, lr=0.1, drift=drift, **options
    )
    assert relative_gap(ours, other) < 1e-5
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)


def test_fifty_steps_stay_within_1e5() -> None:
    torch.manual_seed(4)
    start = [
        torch.randn(3, 16, 8) * 0.3,
        torch.zeros(3, 16),
        torch.randn(3, 4, 16) * 0.3,
        torch.zeros(3, 4),
    ]
    x, y = torch.randn(60, 8), torch.randint(0, 4, (60,))
    batches = make_batches(60, [50, 50, 37], 5)
    options = {"lr": 0.1, "momentum": 0.5, "weight_decay": 1e-3, "prox_mu": 0.01}
    ours, other = [p.clone() for p in start], [p.clone() for p in start]
    load_kernel("batched_mlp").train(ours, x, y, *batches, **options)
    batched_mlp.train(other, x, y, *batches, **options)
    assert relative_gap(ours, other) < 1e-5
