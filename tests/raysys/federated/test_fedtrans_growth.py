"""FedTrans: operations preserve the function, growth is decided as specified, lineage is kept."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.errors import ConfigError
from raysys.federated.core.model import FlatWeights, layout_of, load_flat, macs_per_sample
from raysys.federated.fedtrans.attention import Attention
from raysys.federated.fedtrans.cells import Conv, Dense
from raysys.federated.fedtrans.config import GrowthConfig
from raysys.federated.fedtrans.growth import (
    activeness,
    degree_of_convergence,
    plan_transformation,
    threshold,
)
from raysys.federated.fedtrans.lineage import (
    Model,
    crop,
    derive,
    first_model,
    gather,
    model_from_json,
    project,
    similarity,
)
from raysys.federated.fedtrans.network import CellNet, cell_from_dict, net_from_json
from raysys.federated.fedtrans.signal import Space
from raysys.federated.fedtrans.transform import (
    Split,
    Step,
    apply_mask,
    apply_step,
    apply_weights,
    deepen,
    fold_back,
    possible_steps,
    unit_map,
    widen,
)
from raysys.federated.fedtrans.zoo import ZOO


def outputs(net: CellNet, values: FlatWeights, seed: int = 0) -> npt.NDArray[np.float32]:
    inputs = torch.from_numpy(
        np.random.default_rng(seed).standard_normal((9, *net.shape), dtype=np.float32)
    )
    with torch.inference_mode():
        found: npt.NDArray[np.float32] = load_flat(net.build(), values).eval()(inputs).numpy()
    return found


@pytest.mark.parametrize("name", ZOO)
def test_layout_cost_and_text_agree_with_the_module(name: str) -> None:
    net = ZOO[name]
    assert net_from_json(net.to_json()) == net
    assert layout_of(net.spec()).n_params == net.n_params
    counted = macs_per_sample(net.spec(), torch.zeros(1, *net.shape))
    # Hooks see layers; the products of attention are not layers.
    scores = sum(2 * 4 * 4 * c.heads * c.head_dim for c in net.cells if isinstance(c, Attention))
    assert net.macs() == counted + scores


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("factor", [1.5, 2.0, 3.0])
@pytest.mark.parametrize("split", ["fresh", "uneven"])
def test_every_operation_preserves_the_function(name: str, factor: float, split: Split) -> None:
    net = ZOO[name]
    values = net.initial(1)
    before = outputs(net, values)
    for step in possible_steps(net, factor, 3, split):
        after = outputs(apply_step(net, step), apply_weights(net, values, step))
        assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max(), step


@settings(max_examples=20)
@given(
    name=st.sampled_from(sorted(ZOO)),
    seed=st.integers(0, 1000),
    split=st.sampled_from(["fresh", "uneven"]),
)
def test_chains_of_four_preserve_the_function(name: str, seed: int, split: Split) -> None:
    rng = np.random.default_rng(seed)
    net, values = ZOO[name], ZOO[name].initial(seed)
    before = outputs(net, values)
    for _ in range(4):
        able = possible_steps(net, 2.0, seed, split)
        step = able[int(rng.integers(len(able)))]
        values, net = apply_weights(net, values, step), apply_step(net, step)
    assert np.abs(outputs(net, values) - before).max() <= 1e-5 * np.abs(before).max()


def test_copies_get_uneven_shares_that_sum_to_one() -> None:
    units = unit_map(Space(6, group=2), 18, np.random.default_rng(0), "uneven")
    assert np.array_equal(units.source[:6], np.arange(6))
    assert np.array_equal(np.bincount(units.source), [3] * 6)
    assert np.array_equal(units.source[::2] + 1, units.source[1::2])  # whole groups
    assert np.allclose(np.bincount(units.source, weights=units.share), 1.0)
    assert len(np.unique(units.share)) == 18
    equal = unit_map(Space(6), 12, np.random.default_rng(0), "equal")
    assert np.allclose(equal.share, 0.5)


def test_equal_split_leaves_clones_and_shares_do_not() -> None:
    """The gradient of a copy differs from its original's only where their shares differ."""
    net = CellNet(shape=(6,), cells=(Dense(width=3),), classes=4)
    gaps = {}
    for split in ("uneven", "equal"):
        wide, values, _ = widen(net, net.initial(0), 0, 2.0, 1, split)  # type: ignore[arg-type]
        module = load_flat(wide.build(), values)
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(32, 6, generator=generator)
        targets = torch.randint(0, 4, (32,), generator=generator)
        torch.nn.functional.cross_entropy(module(inputs), targets).backward()  # type: ignore[no-untyped-call]
        gradient = next(module.parameters()).grad
        assert gradient is not None
        order = unit_map(Space(3), 6, np.random.default_rng(1), split).source  # type: ignore[arg-type]
        gaps[split] = max(
            float((gradient[unit] - gradient[order[unit]]).abs().max()) for unit in range(3, 6)
        )
    assert gaps["equal"] < 1e-7
    assert gaps["uneven"] > 1e-4


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("split", ["fresh", "uneven", "equal"])
def test_what_a_step_did_is_folded_back(name: str, split: Split) -> None:
    net = ZOO[name]
    values = net.initial(1)
    for step in possible_steps(net, 2.5, 3, split):
        back = fold_back(net, apply_weights(net, values, step), step)
        assert np.allclose(back, values, atol=1e-6), step


@pytest.mark.parametrize("name", ZOO)
def test_fresh_units_are_all_different_and_learn_from_the_first_step(name: str) -> None:
    net = ZOO[name]
    for step in possible_steps(net, 2.0, 5):
        if step.op != "widen":
            continue
        wide, values = apply_step(net, step), apply_weights(net, net.initial(4), step)
        keep = apply_mask(net, np.ones(net.n_params, dtype=bool), step)
        assert keep.sum() == net.n_params
        assert np.isclose(np.sort(values[keep]), np.sort(net.initial(4))).all()
        module = load_flat(wide.build(), values)
        inputs = torch.randn(16, *net.shape, generator=torch.Generator().manual_seed(1))
        module(inputs).square().sum().backward()
        gradients = [p.grad.reshape(-1) for p in module.parameters() if p.grad is not None]
        # What reads a new unit starts at zero and moves at once; what makes it follows.
        unread = torch.from_numpy(~keep & (values == 0))
        assert (torch.cat(gradients)[unread] != 0).any()


def test_a_loss_curve_with_an_elbow_is_found_after_it() -> None:
    config = GrowthConfig(delta=5, gamma=3, smooth=1, beta=0.01)
    falling = [1.0 - 0.1 * step for step in range(8)]
    assert degree_of_convergence(falling[:7], config) is None  # before delta + gamma rounds
    assert degree_of_convergence(falling, config) == pytest.approx(0.1)
    flat = [*falling, *[0.3] * 8]
    slope = degree_of_convergence(flat, config)
    assert slope is not None
    assert slope <= config.beta
    assert threshold(falling, GrowthConfig(smooth=1, beta_relative=0.01)) == pytest.approx(0.01)


def test_activeness_divides_by_the_weights() -> None:
    net = CellNet(shape=(4,), cells=(Dense(width=4), Dense(width=4)))
    values = np.ones(net.n_params, dtype=np.float32)
    first = net.slices()[0]
    values[first] = 10.0
    found = activeness(net, np.ones(net.n_params), values)
    assert found == pytest.approx([0.1, 1.0])


def test_widening_and_deepening_alternate_and_weak_cells_go_first() -> None:
    model = first_model(CellNet(shape=(8,), cells=(Dense(width=4), Dense(width=4))))
    active = np.array([1.0, 0.95])
    config = GrowthConfig(alpha=0.9)
    plan = plan_transformation(model, active, config, float("inf"), 0, 1)
    assert [(step.op, step.cell) for step in plan.steps] == [("widen", 1), ("widen", 0)]
    child = derive(model, 0, plan.steps, 5)
    again = plan_transformation(child, np.array([1.0, 0.1]), config, float("inf"), 0, 2)
    assert [(step.op, step.cell) for step in again.steps] == [("deepen", 0)]
    # Widening both costs too much; the less active second cell is left as it is.
    one = derive(model, 0, [step for step in plan.steps if step.cell == 0], 5)
    tight = plan_transformation(model, active, config, float(one.net.macs()), 0, 1)
    assert [step.cell for step in tight.steps] == [0]
    assert tight.dropped == (1,)
    assert not plan_transformation(model, active, config, model.net.macs(), 0, 1).steps


def family_of_three(split: Split = "uneven") -> list[Model]:
    first = first_model(CellNet(shape=(6,), cells=(Dense(width=4), Dense(width=4)), classes=3))
    second = derive(first, 0, [Step(op="widen", cell=0, seed=2, split=split)], 10)
    third = derive(second, 1, [Step(op="deepen", cell=1), Step(op="deepen", cell=0)], 20)
    return [first, second, third]


def test_similarity_follows_the_line_of_descent() -> None:
    family = family_of_three()
    assert similarity(family, 1, 1) == 1.0
    # First cell 28 -> 56 parameters; the second reads twice as many units: 20 -> 36; head same.
    assert similarity(family, 0, 1) == pytest.approx((28 / 56 + 20 / 36 + 1) / 3)
    # Two inserted cells count nothing.
    assert similarity(family, 1, 2) == pytest.approx(3 / 5)
    assert similarity(family, 0, 2) == similarity(family, 2, 0)
    assert similarity(family, 0, 2) == pytest.approx((28 / 56 + 20 / 36 + 1) / 5)


def test_projection_carries_the_present_weights_through_the_stored_maps() -> None:
    family = family_of_three()
    values = family[0].net.initial(4)
    carried, there = project(family, values, 0, 2)
    expected = outputs(family[0].net, values)
    assert np.abs(outputs(family[2].net, carried) - expected).max() < 1e-5
    sizes = family[2].net.sizes()
    assert there.sum() == sum(sizes) - sizes[1] - sizes[3]  # inserted cells have no counterpart
    fresh = family_of_three("fresh")
    anew, kept = project(fresh, values, 0, 2)
    assert np.abs(outputs(fresh[2].net, anew) - expected).max() < 1e-5
    assert kept.sum() == family[0].net.n_params  # nor have fresh units
    cropped, mask = crop(family, values, 0, 2)
    assert mask.sum() == family[0].net.n_params
    assert np.isclose(np.sort(cropped[mask]), np.sort(values)).all()
    for members in (family, fresh):
        back, all_there = gather(members, project(members, values, 0, 2)[0], 2, 0)
        assert np.allclose(back, values, atol=1e-6)
        assert all_there.all()
    with pytest.raises(ConfigError, match="ancestor"):
        project(family, values, 2, 0)
    with pytest.raises(ConfigError, match="ancestor"):
        gather(family, values, 0, 2)


def test_a_member_survives_being_written_down() -> None:
    for model in family_of_three():
        assert model_from_json(model.to_json()) == model
    with pytest.raises(ConfigError, match="record"):
        model_from_json("{}")


def test_wrong_requests_are_refused() -> None:
    net = ZOO["attention"]
    values = net.initial(0)
    with pytest.raises(ConfigError, match="Patches"):
        deepen(net, values, 0)
    with pytest.raises(ConfigError, match=r"step\.cell"):
        widen(net, values, 7)
    with pytest.raises(ConfigError, match="weights"):
        net.split(values[:-1])
    with pytest.raises(ConfigError, match="factor"):
        Step(op="widen", cell=0, factor=1.0)
    with pytest.raises(ConfigError, match="image"):
        CellNet(shape=(8,), cells=(Conv(channels=2),))
    with pytest.raises(ConfigError, match="before pooling"):
        CellNet(shape=(1, 1, 1), cells=(Conv(channels=2, pool=True),))
    with pytest.raises(ConfigError, match="network"):
        net_from_json("{}")
    with pytest.raises(ConfigError, match=r"cells\.Dense"):
        cell_from_dict({"kind": "Dense", "channels": 3})
    with pytest.raises(ConfigError, match=r"cells\.kind"):
        net_from_json('{"shape": [3], "cells": [{"kind": "Unknown"}], "classes": 2}')
