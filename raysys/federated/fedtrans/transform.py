"""Widening and deepening as pure functions that do not change what the network computes.

Section 3.3 of the paper copies units and shares their outgoing weights out evenly; all copies then
keep equal gradients for ever, and the wider network never becomes richer than its parent. Where we
differ: new units are drawn anew and nothing reads them yet. Copies with uneven shares (drawn from
U(0.2, 1), normalised), which learn to differ more slowly, are a variant.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from raysys.config import check, check_choice, check_range
from raysys.errors import ConfigError
from raysys.federated.core.model import FlatWeights
from raysys.federated.fedtrans.cells import Array
from raysys.federated.fedtrans.network import STEMS, CellNet, join
from raysys.federated.fedtrans.signal import Axis, Space, SpaceKey

Split = Literal["fresh", "uneven", "equal", "noise"]
SPLITS: tuple[Split, ...] = ("fresh", "uneven", "equal", "noise")
Mask = npt.NDArray[np.bool_]
SMALLEST_SHARE = 0.2
NOISE = 0.1  # of a tensor's standard deviation, for the variant that is not function-preserving


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One operation on one cell; with the network it is applied to, it is reproducible.

    Args:
        op: "widen" or "deepen". cell: index in the network before the step.
        factor: how much wider; ignored by "deepen".
        seed: of the unit map, the shares and the new cell's start.
        split: how a wider cell gets its new units. "fresh": drawn anew, and nothing reads them yet;
            "uneven": copies that share the outgoing weights unevenly; "equal": evenly, as printed;
            "noise": evenly, with noise on the copies, which changes the function.
    """

    op: str
    cell: int
    factor: float = 2.0
    seed: int = 0
    split: Split = "fresh"

    def __post_init__(self) -> None:
        check_choice(self, "op", ("widen", "deepen"))
        check_range(self, "cell", 0)
        check(self, "factor", 1 < self.factor <= 64, "a number above 1 and at most 64")
        check_choice(self, "split", SPLITS)


@dataclasses.dataclass(frozen=True, slots=True)
class UnitMap:
    """Which old unit each new one copies, int64 [new], and its share of the outgoing weights."""

    source: npt.NDArray[np.int64]
    share: npt.NDArray[np.float64]


def can_widen(net: CellNet, cell: int) -> bool:
    """Whether a cell has a width of its own."""
    return bool(net.cells[cell].spaces())


def can_deepen(net: CellNet, cell: int) -> bool:
    """Whether a cell of its kind can be put behind a cell."""
    return not isinstance(net.cells[cell], STEMS)


def possible_steps(
    net: CellNet, factor: float = 2.0, seed: int = 0, split: Split = "fresh"
) -> list[Step]:
    """Every operation that a network allows, cell by cell."""
    steps = []
    for cell in range(len(net.cells)):
        if can_widen(net, cell):
            steps.append(Step(op="widen", cell=cell, factor=factor, seed=seed, split=split))
        if can_deepen(net, cell):
            steps.append(Step(op="deepen", cell=cell, seed=seed))
    return steps


def apply_step(net: CellNet, step: Step) -> CellNet:
    """The network after a step.

    Raises:
        ConfigError: there is no such cell, or it cannot be transformed in this way.
    """
    _check(net, step)
    cells = list(net.cells)
    if step.op == "widen":
        sizes = {
            part: _wider(space, step.factor) for part, space in cells[step.cell].spaces().items()
        }
        cells[step.cell] = cells[step.cell].widened(sizes)
    else:
        leaving = net.signals()[step.cell + 1]
        cells.insert(step.cell + 1, cells[step.cell].deepening(leaving))
    return dataclasses.replace(net, cells=tuple(cells))


def apply_weights(
    net: CellNet, values: FlatWeights, step: Step, *, draw: bool = True
) -> FlatWeights:
    """The weights after a step: the same function, save for rounding (and for split "noise").

    Args:
        values: weights of ``net``, float32 [P].
        draw: False leaves at zero what is drawn anew, for who needs the other values only.
    """
    parts = net.split(values)
    if step.op == "deepen":
        return join(_with_cell(net, parts, step, draw))
    if step.split == "fresh":
        wide = apply_step(net, step)
        drawn = wide.initial(step.seed) if draw else np.zeros(wide.n_params, dtype=np.float32)
        return join(_with_fresh_units(wide, parts, step, drawn))
    maps, rng = _unit_maps(net, step)
    for key, units in maps.items():
        parts = _widen_space(net, parts, key, units)
        if step.split == "noise":
            _disturb(net, parts, key, int(units.source.max()) + 1, rng)
    return join(parts)


def apply_mask(net: CellNet, mask: Mask, step: Step) -> Mask:
    """Which parameters after a step carry on one of those in ``mask``, bool [P] both."""
    parts = net.split(mask.astype(np.float32))
    if step.op == "deepen":
        leaving = net.signals()[step.cell + 1]
        shapes = net.cells[step.cell].deepening(leaving).tensors(leaving, step.cell + 1)
        parts.insert(step.cell + 1, [np.zeros(t.shape, dtype=np.float32) for t in shapes])
    elif step.split == "fresh":
        wide = apply_step(net, step)
        nothing = np.zeros(wide.n_params, dtype=np.float32)
        parts = _with_fresh_units(wide, parts, step, nothing)
    else:
        for key, units in _unit_maps(net, step)[0].items():
            whole = UnitMap(units.source, np.ones(len(units.source)))
            parts = _widen_space(net, parts, key, whole)
    carried: Mask = join(parts) > 0
    return carried


def fold_back(net: CellNet, values: FlatWeights, step: Step) -> FlatWeights:
    """An update of the network after a step as one of ``net`` before it, float32 [P of net].

    Fresh units and the inserted cell fall away; of copies, what they write is averaged and what is
    read of them is added up, since the original's outgoing weights were shared out among them.
    """
    parts = apply_step(net, step).split(values)
    if step.op == "deepen":
        del parts[step.cell + 1]
    elif step.split == "fresh":
        for cell, infos in zip(parts, net.tensors()):
            for number, info in enumerate(infos):
                cell[number] = cell[number][tuple(slice(0, side) for side in info.shape)]
    else:
        for key, units in _unit_maps(net, step)[0].items():
            parts = _narrow_space(net, parts, key, units)
    return join(parts)


def _unit_maps(net: CellNet, step: Step) -> tuple[dict[SpaceKey, UnitMap], np.random.Generator]:
    """The maps of a cell's spaces, and the stream that they were drawn from."""
    rng = np.random.default_rng(step.seed)
    maps = {
        (step.cell, part): unit_map(space, _wider(space, step.factor), rng, step.split)
        for part, space in sorted(net.cells[step.cell].spaces().items())
    }
    return maps, rng


def unit_map(space: Space, size: int, rng: np.random.Generator, split: Split) -> UnitMap:
    """Draw which units are copied to fill ``size`` places, whole groups at a time.

    Every unit is copied once before any is copied twice; which ones go first is random.
    """
    groups, wanted = space.size // space.group, size // space.group
    extra = np.concatenate([rng.permutation(groups) for _ in range(-(-wanted // groups) - 1)])
    chosen = np.concatenate([np.arange(groups), extra[: wanted - groups]]).astype(np.int64)
    source = (chosen[:, None] * space.group + np.arange(space.group)).ravel()
    drawn = (
        rng.uniform(SMALLEST_SHARE, 1.0, len(source)) if split == "uneven" else np.ones(len(source))
    )
    total = np.bincount(source, weights=drawn, minlength=space.size)
    return UnitMap(source, drawn / total[source])


def widen(
    net: CellNet,
    values: FlatWeights,
    cell: int,
    factor: float = 2.0,
    seed: int = 0,
    split: Split = "fresh",
) -> tuple[CellNet, FlatWeights, Step]:
    """Widen one cell; returns network, weights, and the step that projects relatives' weights."""
    step = Step(op="widen", cell=cell, factor=factor, seed=seed, split=split)
    return apply_step(net, step), apply_weights(net, values, step), step


def deepen(
    net: CellNet, values: FlatWeights, cell: int, seed: int = 0
) -> tuple[CellNet, FlatWeights, Step]:
    """Insert one cell behind ``cell``; returns network, weights and the step."""
    step = Step(op="deepen", cell=cell, seed=seed)
    return apply_step(net, step), apply_weights(net, values, step), step


def _check(net: CellNet, step: Step) -> None:
    if step.cell >= len(net.cells):
        raise ConfigError("step.cell", step.cell, f"a cell from 0 to {len(net.cells) - 1}")
    allowed = can_widen if step.op == "widen" else can_deepen
    if not allowed(net, step.cell):
        kind = type(net.cells[step.cell]).__name__
        raise ConfigError("step.op", step.op, f"an operation that a {kind} cell allows")


def _wider(space: Space, factor: float) -> int:
    """At least one group more; groups stay whole when the factor is not an integer."""
    groups = space.size // space.group
    return max(groups + 1, round(groups * factor)) * space.group


def _widen_space(
    net: CellNet, parts: list[list[Array]], key: SpaceKey, units: UnitMap
) -> list[list[Array]]:
    def wider(values: Array, axes: tuple[Axis, ...]) -> Array:
        for number, axis in enumerate(axes):
            if axis.space != key:
                continue
            block = np.arange(axis.block)
            index = (units.source[:, None] * axis.block + block).ravel()
            values = np.take(values, index, axis=number)
            if axis.role == "in":
                shape = [1] * values.ndim
                shape[number] = -1
                share = np.repeat(units.share, axis.block).reshape(shape)
                values = (values * share).astype(np.float32)
        return values

    return [
        [wider(values, info.axes) for values, info in zip(cell, infos)]
        for cell, infos in zip(parts, net.tensors())
    ]


def _narrow_space(
    net: CellNet, parts: list[list[Array]], key: SpaceKey, units: UnitMap
) -> list[list[Array]]:
    copies = np.bincount(units.source).astype(np.float32)

    def narrower(values: Array, axes: tuple[Axis, ...]) -> Array:
        for number, axis in enumerate(axes):
            if axis.space != key:
                continue
            moved = np.moveaxis(values, number, 0)
            blocks = moved.reshape(len(units.source), axis.block, -1)
            total = np.zeros((len(copies), *blocks.shape[1:]), dtype=np.float32)
            np.add.at(total, units.source, blocks)
            if axis.role == "out":
                total /= copies[:, None, None]
            shape = (len(copies) * axis.block, *moved.shape[1:])
            values = np.moveaxis(total.reshape(shape), 0, number)
        return values

    return [
        [narrower(values, info.axes) for values, info in zip(cell, infos)]
        for cell, infos in zip(parts, net.tensors())
    ]


def _with_fresh_units(
    wide: CellNet, parts: list[list[Array]], step: Step, drawn: FlatWeights
) -> list[list[Array]]:
    """Old values in their old places; around them what ``drawn`` has, and 0 where it is read."""
    spaces = {(step.cell, part) for part in wide.cells[step.cell].spaces()}
    fresh = wide.split(drawn)
    for olds, news, infos in zip(parts, fresh, wide.tensors()):
        for old, new, info in zip(olds, news, infos):
            for number, axis in enumerate(info.axes):
                if axis.space in spaces and axis.role == "in":
                    unread = [slice(None)] * new.ndim
                    unread[number] = slice(old.shape[number], None)
                    new[tuple(unread)] = 0.0
            new[tuple(slice(0, side) for side in old.shape)] = old
    return fresh


def _disturb(
    net: CellNet, parts: list[list[Array]], key: SpaceKey, old: int, rng: np.random.Generator
) -> None:
    """Add noise to the incoming weights of the copies, in place."""
    for cell, infos in zip(parts, net.tensors()):
        for values, info in zip(cell, infos):
            if info.axes[0].space == key and info.axes[0].role == "out" and values.ndim > 1:
                copies = values[old * info.axes[0].block :]
                scale = NOISE * float(values.std())
                copies += (scale * rng.standard_normal(copies.shape)).astype(np.float32)


def _with_cell(net: CellNet, parts: list[list[Array]], step: Step, draw: bool) -> list[list[Array]]:
    leaving = net.signals()[step.cell + 1]
    cell = net.cells[step.cell].deepening(leaving)
    if draw:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(step.seed)
            drawn = [p.detach().numpy().copy() for p in cell.module(leaving).parameters()]
    else:
        shapes = cell.tensors(leaving, step.cell + 1)
        drawn = [np.zeros(info.shape, dtype=np.float32) for info in shapes]
    fresh = cell.identity(leaving, drawn, np.random.default_rng(step.seed))
    return [*parts[: step.cell + 1], fresh, *parts[step.cell + 1 :]]
