"""Who descends from whom: similarity of models, and a relative's weights in a descendant's shape.

Sections 4 and 5 of the paper leave open how the similarity of cells is accumulated; ours is the
mean over the cells of the larger model of the product of per-cell factors along the line of
descent.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from raysys.errors import ConfigError
from raysys.federated.core.model import FlatWeights
from raysys.federated.fedtrans.network import CellNet, join, net_from_json
from raysys.federated.fedtrans.transform import (
    Mask,
    Step,
    apply_mask,
    apply_step,
    apply_weights,
    fold_back,
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """One member of the family.

    Args:
        net: its network. parent: index in the family, None for the first.
        created: round in which it was derived. steps: how it was derived from its parent.
        origin: for each cell and last the classifier, the parent's cell, or None if inserted.
        inherited: for each of them, old over new number of parameters; 0 if inserted.
        last_op: the last operation on each cell, "" for none.
        retired: round in which it was retired, or None.
    """

    net: CellNet
    parent: int | None = None
    created: int = 0
    steps: tuple[Step, ...] = ()
    origin: tuple[int | None, ...] = ()
    inherited: tuple[float, ...] = ()
    last_op: tuple[str, ...] = ()
    retired: int | None = None

    def to_json(self) -> str:
        """The member as text; :func:`model_from_json` reads it."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["net"] = self.net.to_json()
        fields["steps"] = [dataclasses.asdict(step) for step in self.steps]
        return json.dumps(fields)


def model_from_json(text: str) -> Model:
    """Read :meth:`Model.to_json`.

    Raises:
        ConfigError: the text is not of a model.
    """
    try:
        fields: dict[str, Any] = json.loads(text)
        net = net_from_json(fields.pop("net"))
        steps = tuple(Step(**step) for step in fields.pop("steps"))
        lists: dict[str, Any] = {
            n: tuple(fields.pop(n)) for n in ("origin", "inherited", "last_op")
        }
        return Model(net=net, steps=steps, **lists, **fields)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError("model", text[:80], "a family member's record", repr(error)) from error


def first_model(net: CellNet) -> Model:
    """The model that the family starts with."""
    return Model(net=net, last_op=("",) * len(net.cells))


def derive(parent: Model, index: int, steps: Sequence[Step], round_id: int) -> Model:
    """The child that ``steps`` make of a parent; steps must come from the last cell to the first.

    Raises:
        ConfigError: the steps are out of order or do not fit the parent.
    """
    order = [step.cell for step in steps]
    if not steps or order != sorted(set(order), reverse=True):
        raise ConfigError("steps", order, "one step a cell, from the last cell to the first")
    net = parent.net
    origin: list[int | None] = list(range(len(net.cells) + 1))
    last_op = list(parent.last_op)
    for step in steps:
        net = apply_step(net, step)
        last_op[step.cell] = step.op
        if step.op == "deepen":
            origin.insert(step.cell + 1, None)
            last_op.insert(step.cell + 1, "")
    old, new = parent.net.sizes(), net.sizes()
    inherited = [0.0 if o is None else old[o] / size for o, size in zip(origin, new)]
    return Model(
        net=net,
        parent=index,
        created=round_id,
        steps=tuple(steps),
        origin=tuple(origin),
        inherited=tuple(inherited),
        last_op=tuple(last_op),
    )


def check_family(family: Sequence[Model]) -> None:
    """Check that every member is what its recorded steps make of its parent.

    Raises:
        ConfigError: a record was damaged: its maps would carry weights to the wrong units.
    """
    for index, model in enumerate(family):
        if model.parent is None and index == 0:
            continue
        sound = model.parent is not None and 0 <= model.parent < index
        if sound and model.parent is not None:
            again = derive(family[model.parent], model.parent, model.steps, model.created)
            sound = dataclasses.replace(again, retired=model.retired) == model
        if not sound:
            raise ConfigError(
                f"family[{index}]", model.net.describe(), "what its steps make of its parent",
                "The record is damaged: take an earlier checkpoint",
            )  # fmt: skip


def ancestors(family: Sequence[Model], index: int) -> list[int]:
    """A model, its parent, and so on to the first."""
    line = [index]
    while (parent := family[line[-1]].parent) is not None:
        line.append(parent)
    return line


def similarity(family: Sequence[Model], first: int, second: int) -> float:
    """Similarity of two models in [0, 1]; symmetric, 1 for a model and itself."""
    if first == second:
        return 1.0
    one, two = ancestors(family, first), ancestors(family, second)
    common = next((index for index in one if index in two), None)
    if common is None:
        return 0.0
    larger, smaller = (first, second)
    if family[second].net.n_params > family[first].net.n_params:
        larger, smaller = second, first
    there = {cell: factor for cell, factor in _trace(family, smaller, common) if cell is not None}
    shares = [
        0.0 if cell is None else factor * there.get(cell, 0.0)
        for cell, factor in _trace(family, larger, common)
    ]
    return float(np.clip(np.mean(shares), 0.0, 1.0))


def project(
    family: Sequence[Model], values: FlatWeights, ancestor: int, index: int
) -> tuple[FlatWeights, Mask]:
    """An ancestor's weights in a descendant's shape, and which parameters have a counterpart.

    The very steps that made the descendant are applied to the ancestor's present weights, so unit 7
    of the child gets what unit 7 was made of.

    Returns:
        float32 [P] and bool [P] of the descendant; inserted cells and fresh units are False.

    Raises:
        ConfigError: ``ancestor`` is not one, or the weights are not the ancestor's.
    """
    line = ancestors(family, index)
    if ancestor not in line:
        raise ConfigError("ancestor", ancestor, f"one of {line}")
    net = family[ancestor].net
    there: Mask = np.ones(net.n_params, dtype=bool)
    for descendant in reversed(line[: line.index(ancestor)]):
        for step in family[descendant].steps:
            there = apply_mask(net, there, step)
            values = apply_weights(net, values, step, draw=False)
            net = apply_step(net, step)
    return values, there


def gather(
    family: Sequence[Model], values: FlatWeights, descendant: int, index: int
) -> tuple[FlatWeights, Mask]:
    """The other way: a descendant's update of what it has from an ancestor, in the latter's shape.

    Undoes :func:`project`; see :func:`~raysys.federated.fedtrans.transform.fold_back`.

    Returns:
        float32 [P] and bool [P] of the ancestor.

    Raises:
        ConfigError: ``index`` is no ancestor of ``descendant``.
    """
    line = ancestors(family, descendant)
    if index not in line:
        raise ConfigError("ancestor", index, f"one of {line}")
    for child in line[: line.index(index)]:
        net, nets = family[line[line.index(child) + 1]].net, []
        for step in family[child].steps:
            nets.append(net)
            net = apply_step(net, step)
        for before, step in zip(reversed(nets), reversed(family[child].steps)):
            values = fold_back(before, values, step)
    return values, np.ones(len(values), dtype=bool)


def crop(
    family: Sequence[Model], values: FlatWeights, ancestor: int, index: int
) -> tuple[FlatWeights, Mask]:
    """The printed alternative to :func:`project`: weights go to the same positions, cell by cell.

    Returns and raises as :func:`project`; what the smaller tensor does not cover is False.
    """
    source = family[ancestor].net.split(values)
    filled, mask = [], []
    cells = [cell for cell, _ in _trace(family, index, ancestor)]
    for cell, infos in zip(cells, family[index].net.tensors()):
        for number, info in enumerate(infos):
            into = np.zeros(info.shape, dtype=np.float32)
            there = np.zeros(info.shape, dtype=np.float32)
            if cell is not None:
                taken = source[cell][number]
                corner = tuple(slice(0, min(a, b)) for a, b in zip(taken.shape, into.shape))
                into[corner], there[corner] = taken[corner], 1.0
            filled.append(into)
            mask.append(there)
    return join([filled]), join([mask]) > 0


def _trace(family: Sequence[Model], index: int, ancestor: int) -> list[tuple[int | None, float]]:
    """For each cell (and the classifier) of a model: the ancestor's cell, and its factor."""
    cells: list[tuple[int | None, float]] = [
        (cell, 1.0) for cell in range(len(family[index].net.cells) + 1)
    ]
    while index != ancestor:
        model = family[index]
        cells = [
            (None, 0.0) if cell is None else (model.origin[cell], factor * model.inherited[cell])
            for cell, factor in cells
        ]
        parent = model.parent
        if parent is None:
            raise ConfigError("ancestor", ancestor, "an ancestor of the model")
        index = parent
    return cells
