"""Block discovery, legality of cuts, grouping by cost, hooks mode."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from raysys.errors import ConfigError, DataError, InfeasibleError
from raysys.training.kgt import blocks, models
from raysys.training.kgt.plan import group_by_cost, parse


def tiny_resnet() -> models.ResNet:
    return models.ResNet(3, widths=(4, 4, 8), dimensions=1)


SIGNAL = torch.randn(6, 1, 16)


def ticking() -> Callable[[], float]:
    """A clock by which every pass of every block takes equally long."""
    ticks = itertools.count()
    return lambda: float(next(ticks))


def test_residual_net_is_cut_at_its_blocks_and_runs_the_same() -> None:
    model = tiny_resnet()
    plan = parse(model, (SIGNAL,), modules=16)
    assert plan.mode == "segments"
    units = [name for module in plan.modules for name in module.units]
    assert units == ["stem.0", "stem.1", "blocks.0", "blocks.1", "blocks.2", "head"]
    model.eval()
    h: Any = None
    for module in plan.modules:
        assert module.segment is not None
        h = module.segment(h, SIGNAL)
    assert torch.equal(h, model(SIGNAL))
    assert sum(len(m.parameters) for m in plan.modules) == len(list(model.parameters()))


def test_a_slice_of_numpy_images_is_measured_in_the_layout_of_training() -> None:
    model = models.ResNet(3, widths=(4, 4, 8), dimensions=2)
    images = np.zeros((16, 8, 8), np.float32)[:, None]
    seen: list[tuple[int, ...]] = []
    model.stem[0].register_forward_pre_hook(lambda part, given: seen.append(given[0].stride()))
    parse(model, (torch.from_numpy(images)[:6],), modules=16)
    assert set(seen) == {(64, 64, 8, 1)}


def test_parsing_leaves_the_model_as_it_was() -> None:
    model = tiny_resnet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.random.get_rng_state()
    parse(model, (SIGNAL,))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(random_state, torch.random.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_transformer_blocks_are_found_inside_a_module_list() -> None:
    model = models.TextClassifier(2, vocabulary=20, length=8, width=8, blocks=3, heads=2)
    plan = parse(model, (torch.randint(0, 20, (4, 8)),), modules=16)
    units = [name for module in plan.modules for name in module.units]
    assert units == ["embedding", "blocks.0", "blocks.1", "blocks.2", "norm", "head"]


def test_grouping_by_cost_by_hand() -> None:
    one, two = (4,), (8,)
    shapes: list[tuple[int, ...] | None] = [one, one, one, two, two, (2,)]
    # Target 10 / 2 = 5: blocks 0-1 reach it; 2 is light and joins; the stage change opens 3.
    assert group_by_cost([2, 3, 1, 2, 2, 0], shapes, 2) == [[0, 1, 2], [3, 4], [5]]
    # Enough modules for every block.
    assert group_by_cost([1, 1, 1, 1, 1, 1], shapes, 6) == [[0], [1], [2], [3], [4], [5]]
    # The head stays alone even when all before it is light.
    assert group_by_cost([1, 1, 100], [one, one, one], 2) == [[0, 1], [2]]


class Skips(nn.Module):
    """A long skip as in a U-Net: no cut between the ends is legal."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        out: Tensor = self.head(self.c(self.b(a)) + a)
        return out


def test_a_long_skip_merges_what_it_spans() -> None:
    plan = parse(Skips(), (torch.randn(5, 4),), modules=16, clock=ticking())
    assert [module.units for module in plan.modules] == [("a",), ("b", "c"), ("head",)]
    assert any("more than one tensor" in note for note in plan.notes)


class Tied(nn.Module):
    """Embedding and output projection share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.middle = nn.Linear(4, 4)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.out(self.middle(self.embed(ids)))
        return out


def test_weight_tying_is_refused_with_the_reason() -> None:
    with pytest.raises(InfeasibleError, match="shared weights"):
        parse(Tied(), (torch.randint(0, 6, (3, 2)),))


class Twice(nn.Module):
    """One layer runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.b(self.a(self.b(x))))
        return out


def test_a_repeated_module_merges_what_lies_between_its_calls() -> None:
    plan = parse(Twice(), (torch.randn(3, 4),), modules=16)
    assert len(plan) == 2
    assert any("b runs 2 times" in note for note in plan.notes)


def test_a_single_block_is_refused() -> None:
    with pytest.raises(InfeasibleError, match="single block"):
        parse(nn.Sequential(nn.Linear(4, 2)), (torch.randn(3, 4),))


class Branches(nn.Module):
    """Control flow that depends on data: cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if h.sum() > 0:
            h = -h
        out: Tensor = self.head(self.b(h))
        return out


def test_untraceable_models_use_hooks_and_say_why() -> None:
    plan = parse(Branches(), (torch.randn(3, 4),), modules=16, clock=ticking())
    assert plan.mode == "hooks"
    assert [module.units for module in plan.modules] == [("a",), ("b",), ("head",)]
    assert "not traceable" in plan.notes[0]


class TopDropout(nn.Module):
    """Functional dropout outside a block would be fixed to one mode by tracing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(functional.dropout(self.a(x), 0.5, self.training))
        return out


def test_functional_dropout_between_blocks_uses_hooks() -> None:
    plan = parse(TopDropout(), (torch.randn(3, 4),))
    assert plan.mode == "hooks"
    assert "dropout" in plan.notes[0]


def test_pattern_overrides_discovery_and_is_checked() -> None:
    model = tiny_resnet()
    assert blocks.find_units(model, r"blocks\.\d|head") == [
        "blocks.0", "blocks.1", "blocks.2", "head",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="regular expression"):
        blocks.find_units(model, "(")
    with pytest.raises(ConfigError, match="a match among module names"):
        blocks.find_units(model, "layer9")
    with pytest.raises(ConfigError, match="disjoint"):
        blocks.find_units(model, r"blocks.*")


def test_a_signature_reproduces_a_grouping_and_a_wrong_one_is_refused() -> None:
    model = tiny_resnet()
    wanted = [["stem.0", "stem.1"], ["blocks.0", "blocks.1"], ["blocks.2"], ["head"]]
    assert parse(model, (SIGNAL,), signature=wanted).signature() == wanted
    with pytest.raises(DataError, match="module 0 held"):
        parse(model, (SIGNAL,), signature=[["stem.0", "other"], ["head"]])
    with pytest.raises(DataError, match="knows nothing of"):
        parse(model, (SIGNAL,), signature=wanted[:2])


def test_measured_time_decides_with_the_clock_that_is_passed_in() -> None:
    plan = parse(tiny_resnet(), (SIGNAL,), modules=16, clock=ticking())
    assert all(m.cost.forward_s == 1.0 and m.cost.backward_s == 1.0 for m in plan.modules)
    assert sum("head, never frozen" in line for line in plan.lines()) == 1
