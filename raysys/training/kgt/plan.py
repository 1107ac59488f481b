"""Layer modules: runs of blocks that freeze as a unit, of similar measured cost.

Paper, section 4.1: merge neighbouring blocks until modules have similar size, and never freeze the
head. We take measured time as the size, since on a CPU a front stage with few parameters is a large
share of the work; and a module never spans a change of the output's shape.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from raysys.errors import DataError, InfeasibleError
from raysys.training.kgt import blocks, hooks
from raysys.training.kgt.savings import ModuleCost

Clock = Callable[[], float]
_REPEATS = 3


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class LayerModule:
    """One unit of freezing.

    Args:
        units: names of the model's own modules in it, in order of execution.
        segment: callable ``(h, *inputs)``, or None in hook mode.
        cost: measured cost for one example batch.
        shape: shape of its output without the batch dimension, None if it is not one tensor.
    """

    units: tuple[str, ...]
    segment: nn.Module | None
    parameters: tuple[nn.Parameter, ...]
    cost: ModuleCost
    shape: tuple[int, ...] | None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class ModulePlan:
    """The model's layer modules, first to last; the last is the head and never frozen.

    Args:
        mode: ``segments`` (traced: the prefix can be skipped and cached) or ``hooks`` (the model
            runs as it is; frozen modules only lose their backward pass).
        notes: what was merged, left out or estimated, and why.
    """

    modules: tuple[LayerModule, ...]
    mode: Literal["segments", "hooks"]
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.modules)

    def signature(self) -> list[list[str]]:
        """Unit names per module: what a checkpoint must agree with."""
        return [list(module.units) for module in self.modules]

    def lines(self) -> Iterator[str]:
        """The plan as text, one line per module."""
        whole = sum(module.cost.step_s for module in self.modules) or 1.0
        for index, module in enumerate(self.modules):
            share = module.cost.step_s / whole
            count = sum(parameter.numel() for parameter in module.parameters)
            head = " (head, never frozen)" if index == len(self) - 1 else ""
            names = f"{module.units[0]} .. {module.units[-1]}" if module.units else "(no units)"
            yield f"{index}  {share:5.1%} of a step  {count:>9} parameters  {names}{head}"


def parse(
    model: nn.Module,
    example: Sequence[Tensor] | Mapping[str, Tensor],
    *,
    modules: int = 8,
    pattern: str = "",
    signature: Sequence[Sequence[str]] | None = None,
    hooks_only: bool = False,
    clock: Clock = time.process_time,
) -> ModulePlan:
    """Find, measure and group the layer modules of a model.

    Args:
        example: a training batch of model inputs; the model's state is the same afterwards.
        modules: aim at this many modules at most (never fewer than the shape changes ask for).
        pattern: regular expression over module names instead of discovery.
        signature: group exactly as an earlier plan did; needed when resuming, since measured
            costs differ from run to run.
        hooks_only: do not trace, because someone else calls the model.
        clock: CPU seconds; passed in so that tests decide.

    Raises:
        ConfigError: the pattern is wrong.
        InfeasibleError: fewer than two layer modules can be told apart.
        DataError: the model does not have the blocks that ``signature`` names.
    """
    units = blocks.find_units(model, pattern)
    if isinstance(example, Mapping) or hooks_only:
        reason = "the model runs as it is, watched by hooks"
        return _hook_plan(model, example, units, signature, modules, reason, clock)
    example = [_plain(value) for value in example]
    with hooks.untouched(model):
        try:
            traced = blocks.trace(model, units, example)
        except Exception as error:  # fx raises anything that the model's own forward raises
            first = str(error).strip().split("\n")[0]
            reason = f"not traceable, so hooks are used ({type(error).__name__}: {first})"[:300]
            return _hook_plan(model, example, units, signature, modules, reason, clock)
        cuts, notes = blocks.legal_cuts(traced, units)
        fine = _build(traced, cuts, example, [[index] for index in range(len(cuts))], clock)
    groups = _groups(fine, modules, signature)
    _check_count(groups, notes)
    if len(groups) == len(fine):
        return ModulePlan(tuple(fine), "segments", tuple(notes))
    with hooks.untouched(model):
        merged = _build(traced, cuts, example, groups, None)
    costed = [
        dataclasses.replace(module, cost=_sum_costs([fine[index].cost for index in group]))
        for module, group in zip(merged, groups)
    ]
    return ModulePlan(tuple(costed), "segments", tuple(notes))


def _plain(value: Tensor) -> Tensor:
    """The values with the strides that a batch drawn by index has.

    A slice of images of one channel, made by NumPy, passes for channels-last as well. Convolutions
    then measure that layout, which the training does not use, and PyTorch 2.13 on a CPU with AVX2
    writes beyond its memory in the backward pass of one of them (strided, 1 x 1, 4 channels).
    """
    return value.clone(memory_format=torch.contiguous_format) if value.is_contiguous() else value


def _build(
    traced: Any,
    cuts: Sequence[blocks.Cut],
    example: Sequence[Tensor],
    groups: Sequence[Sequence[int]],
    clock: Clock | None,
) -> list[LayerModule]:
    built: list[LayerModule] = []
    h: Any = None
    for group in groups:
        head = group[-1] == len(cuts) - 1
        enters = cuts[group[0] - 1].value if group[0] else ""
        value = "" if head else cuts[group[-1]].value
        part = blocks.segment(traced, cuts[group[0]].first, cuts[group[-1]].last, value, enters)
        units = tuple(name for index in group for name in cuts[index].units)
        cost, h = _measure(part, h, example, clock)
        shape = tuple(h.shape[1:]) if isinstance(h, Tensor) else None
        built.append(LayerModule(units, part, tuple(part.parameters()), cost, shape))
    return built


def _measure(
    part: nn.Module, h: Tensor | None, example: Sequence[Tensor], clock: Clock | None
) -> tuple[ModuleCost, Any]:
    """Median forward and backward time of a segment, and its output (detached)."""
    if clock is None:
        with torch.no_grad():
            return ModuleCost(forward_s=0.0, backward_s=0.0), part(h, *example)
    forward, backward = [], []
    out: Any = None
    for _ in range(_REPEATS):
        arriving = None
        if h is not None:
            arriving = h.detach().requires_grad_(h.is_floating_point())
        start = clock()
        out = part(arriving, *example)
        middle = clock()
        if isinstance(out, Tensor) and out.requires_grad:
            torch.autograd.backward(out, torch.ones_like(out))
        forward.append(middle - start)
        backward.append(clock() - middle)
    cost = ModuleCost(forward_s=statistics.median(forward), backward_s=statistics.median(backward))
    return cost, out.detach() if isinstance(out, Tensor) else out


def _groups(
    fine: Sequence[LayerModule], modules: int, signature: Sequence[Sequence[str]] | None
) -> list[list[int]]:
    if signature is not None:
        return _groups_of(fine, signature)
    return group_by_cost(
        [module.cost.step_s for module in fine], [module.shape for module in fine], modules
    )


def group_by_cost(
    costs: Sequence[float], shapes: Sequence[tuple[int, ...] | None], modules: int
) -> list[list[int]]:
    """Merge blocks left to right until a group holds 1/modules of the cost.

    A group never spans a change of shape; a light tail of a stage joins the group before it; the
    last block is the head and stays alone.
    """
    target = sum(costs) / min(modules, len(costs))
    groups: list[list[int]] = []
    open_group = False
    for index in range(len(costs)):
        head = index == len(costs) - 1
        new_stage = index > 0 and shapes[index] != shapes[index - 1]
        if open_group and not head and not new_stage:
            groups[-1].append(index)
        else:
            _close_light_tail(groups, costs, shapes, target)
            groups.append([index])
        open_group = sum(costs[i] for i in groups[-1]) < target
    return groups


def _close_light_tail(
    groups: list[list[int]],
    costs: Sequence[float],
    shapes: Sequence[tuple[int, ...] | None],
    target: float,
) -> None:
    if len(groups) < 2 or sum(costs[index] for index in groups[-1]) >= target / 2:
        return
    if shapes[groups[-1][0]] == shapes[groups[-2][-1]]:
        light = groups.pop()
        groups[-1].extend(light)


def _groups_of(fine: Sequence[LayerModule], signature: Sequence[Sequence[str]]) -> list[list[int]]:
    """Group so that the modules hold exactly the units of an earlier plan."""
    groups: list[list[int]] = []
    at = 0
    for wanted in signature:
        group: list[int] = []
        have: list[str] = []
        while at < len(fine) and len(have) < len(wanted):
            have += fine[at].units
            group.append(at)
            at += 1
        if have != list(wanted):
            raise DataError(
                "checkpoint",
                f"module {len(groups)} held {list(wanted)}, this model gives {have}",
                "Resume with the model that the checkpoint was made from",
            )
        groups.append(group)
    if at != len(fine) or not groups:
        left = [name for module in fine[at:] for name in module.units]
        raise DataError("checkpoint", f"knows nothing of {left}", "Resume with the same model")
    return groups


def _check_count(groups: Sequence[object], notes: Sequence[str]) -> None:
    if len(groups) < 2:
        why = "; ".join(notes) or "the model is a single block"
        raise InfeasibleError(
            "freezing a prefix", why, "Give `pattern`, or train this model without freezing"
        )


def _sum_costs(costs: Sequence[ModuleCost]) -> ModuleCost:
    return ModuleCost(
        forward_s=sum(cost.forward_s for cost in costs),
        backward_s=sum(cost.backward_s for cost in costs),
    )


def _hook_plan(
    model: nn.Module,
    example: Sequence[Tensor] | Mapping[str, Tensor],
    units: Sequence[str],
    signature: Sequence[Sequence[str]] | None,
    modules: int,
    reason: str,
    clock: Clock,
) -> ModulePlan:
    probes, notes = hooks.probe(model, example, units, clock)
    notes = [reason, *notes]
    fine = [
        LayerModule(
            probe.units,
            None,
            hooks.parameters_of(model, probe.units),
            ModuleCost(forward_s=probe.forward_s, backward_s=2 * probe.forward_s),
            probe.shape,
        )
        for probe in probes
    ]
    _check_count(fine, notes)
    groups = _groups(fine, modules, signature)
    _check_count(groups, notes)
    merged = [
        LayerModule(
            tuple(name for index in group for name in fine[index].units),
            None,
            tuple(parameter for index in group for parameter in fine[index].parameters),
            _sum_costs([fine[index].cost for index in group]),
            fine[group[-1]].shape,
        )
        for group in groups
    ]
    return ModulePlan(tuple(merged), "hooks", tuple(notes))
