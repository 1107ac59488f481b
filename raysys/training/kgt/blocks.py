"""Finding a model's building blocks and the places where it may be cut.

A block is a residual block, an encoder block or a plain layer, found from the model's own
structure. A cut after a block is legal when exactly one tensor crosses it; the model's own inputs
(an attention mask, say) are at hand everywhere and do not count. Blocks whose cut is illegal, that
share a parameter, or that run twice are merged with their neighbours (paper, section 4.1).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional

from raysys.errors import ConfigError

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_MODE_DEPENDENT: tuple[Any, ...] = (
    functional.dropout,
    functional.dropout1d,
    functional.dropout2d,
    functional.alpha_dropout,
    functional.batch_norm,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Cut:
    """A run of graph nodes ``first .. last`` that ends in the tensor ``value``."""

    units: tuple[str, ...]
    first: int
    last: int
    value: str


def find_units(model: nn.Module, pattern: str = "") -> list[str]:
    """Names of the building blocks, in the order in which the model registers them.

    Args:
        pattern: regular expression; the modules whose whole name matches are the blocks.

    Raises:
        ConfigError: the pattern is malformed or matches nothing, or one match contains another.
    """
    if pattern:
        return _matching(model, pattern)
    found: list[str] = []
    _descend(model, "", found)
    return found


def _matching(model: nn.Module, pattern: str) -> list[str]:
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise ConfigError("pattern", pattern, f"a regular expression ({error})") from None
    names = [name for name, _ in model.named_modules() if name and wanted.fullmatch(name)]
    if not names:
        known = ", ".join([name for name, _ in model.named_modules() if name][:12])
        raise ConfigError("pattern", pattern, "a match among module names", f"There are: {known}")
    for outer in names:
        inside = [name for name in names if name.startswith(f"{outer}.")]
        if inside:
            raise ConfigError(
                "pattern", pattern, f"disjoint modules, but {outer} holds {inside[0]}"
            )
    return names


def _descend(module: nn.Module, prefix: str, found: list[str]) -> None:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, _CONTAINERS) or _holds_blocks(child):
            _descend(child, f"{path}.", found)
        elif any(True for _ in child.parameters()) or any(True for _ in child.buffers()):
            found.append(path)


def _holds_blocks(module: nn.Module) -> bool:
    """Whether somewhere inside lies a container with composite children: not a block itself."""
    for inner in module.modules():
        if isinstance(inner, _CONTAINERS):
            composite = [child for child in inner.children() if _composite(child)]
            if composite:
                return True
    return False


def _composite(module: nn.Module) -> bool:
    return not isinstance(module, _CONTAINERS) and any(True for _ in module.children())


class _UnitTracer(fx.Tracer):
    def __init__(self, units: Sequence[str]) -> None:
        super().__init__()
        self.units = set(units)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        inside = any(unit.startswith(f"{module_qualified_name}.") for unit in self.units)
        return not inside and not isinstance(m, _CONTAINERS)


def trace(model: nn.Module, units: Sequence[str], example: Sequence[Tensor]) -> fx.GraphModule:
    """Trace with the units as leaves and note each node's shape; raises what fx raises."""
    graph = _UnitTracer(units).trace(model)
    for node in reversed(list(graph.nodes)):
        if node.op == "placeholder" and not node.users and node.args:
            graph.erase_node(node)  # an argument with a default that the model does not use
        if node.op == "call_function" and node.target in _MODE_DEPENDENT:
            raise TypeError(f"{node.name} outside a block fixes train or eval mode at tracing")
    traced = fx.GraphModule(model, graph)
    with torch.no_grad():
        ShapeProp(traced).propagate(*example)
    return traced


def legal_cuts(traced: fx.GraphModule, units: Sequence[str]) -> tuple[list[Cut], list[str]]:
    """Cut the graph after every unit where that is legal.

    Returns:
        The cuts in order (the last one runs to the model's output), and notes on what was merged
        and why.
    """
    nodes = [node for node in traced.graph.nodes if node.op != "output"]
    position = {node: index for index, node in enumerate(nodes)}
    calls = _calls(nodes, units)
    tied = _tied_spans(traced, nodes)
    spans = [*tied, *[(min(at), max(at)) for at in calls.values() if len(at) > 1]]
    notes = [f"{name} runs {len(at)} times" for name, at in calls.items() if len(at) > 1]
    notes += [f"nodes {nodes[low].name} to {nodes[high].name} share weights" for low, high in tied]
    ends: list[tuple[int, fx.Node]] = []
    unit_at = sorted((at[-1], name) for name, at in calls.items())
    for index, (at, name) in enumerate(unit_at[:-1]):
        limit = unit_at[index + 1][0]
        end = _extend(nodes, position, at, limit)
        if end is None:
            notes.append(f"after {name} more than one tensor is still needed")
        elif any(low <= end[0] < high for low, high in spans):
            notes.append(f"after {name} shared weights or a repeated call are still needed")
        else:
            ends.append(end)
    return _assemble(nodes, ends, unit_at), notes


def _calls(nodes: Sequence[fx.Node], units: Sequence[str]) -> dict[str, list[int]]:
    calls: dict[str, list[int]] = {}
    for index, node in enumerate(nodes):
        if node.op == "call_module" and str(node.target) in units:
            calls.setdefault(str(node.target), []).append(index)
    return calls


def _tied_spans(traced: fx.GraphModule, nodes: Sequence[fx.Node]) -> list[tuple[int, int]]:
    """First and last node of every parameter that several nodes use."""
    users: dict[int, list[int]] = {}
    for index, node in enumerate(nodes):
        for parameter in node_parameters(traced, node):
            used_at = [nodes.index(user) for user in node.users if user.op != "output"]
            users.setdefault(id(parameter), []).extend(
                used_at if node.op == "get_attr" else [index]
            )
    return [(min(at), max(at)) for at in users.values() if at and min(at) != max(at)]


def node_parameters(traced: fx.GraphModule, node: fx.Node) -> list[nn.Parameter]:
    """Parameters that a node of the graph uses."""
    if node.op == "call_module":
        return list(traced.get_submodule(str(node.target)).parameters())
    if node.op == "get_attr":
        parent, _, name = str(node.target).rpartition(".")
        value = getattr(traced.get_submodule(parent), name)
        return [value] if isinstance(value, nn.Parameter) else []
    return []


def _extend(
    nodes: Sequence[fx.Node], position: dict[fx.Node, int], at: int, limit: int
) -> tuple[int, fx.Node] | None:
    """The last legal cut between a unit and the next that keeps the unit's output shape."""
    shape = _shape(nodes[at])
    best: tuple[int, fx.Node] | None = None
    for index in range(at, limit):
        live = _live_after(nodes, position, index)
        if len(live) == 1 and (best is None or _shape(live[0]) == shape):
            best = (index, live[0])
    return best


def _live_after(
    nodes: Sequence[fx.Node], position: dict[fx.Node, int], index: int
) -> list[fx.Node]:
    """Values computed up to ``index`` and used later; model inputs and attributes are free."""
    return [
        node
        for node in nodes[: index + 1]
        if node.op not in ("placeholder", "get_attr")
        and any(position.get(user, len(nodes)) > index for user in node.users)
    ]


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    meta = node.meta.get("tensor_meta")
    shape = getattr(meta, "shape", None)
    return tuple(shape) if shape is not None else None


def _assemble(
    nodes: Sequence[fx.Node],
    ends: Sequence[tuple[int, fx.Node]],
    unit_at: Sequence[tuple[int, str]],
) -> list[Cut]:
    cuts, first = [], 0
    for last, value in [*ends, (len(nodes) - 1, nodes[-1])]:
        inside = tuple(name for at, name in unit_at if first <= at <= last)
        cuts.append(Cut(inside, first, last, value.name))
        first = last + 1
    return cuts


def segment(traced: fx.GraphModule, first: int, last: int, value: str, enters: str) -> nn.Module:
    """Build the callable of nodes ``first .. last``; it shares its parameters with the model.

    Args:
        value: name of the node that is returned; empty returns the model's own output.
        enters: name of the node whose value comes in; empty for the model's beginning.

    Returns:
        A module of ``(h, *model inputs)``; ``h`` is None at the beginning.
    """
    nodes = [node for node in traced.graph.nodes if node.op != "output"]
    output = next(node for node in traced.graph.nodes if node.op == "output")
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    arriving = graph.placeholder("h")
    for node in nodes:
        if node.op == "placeholder":
            made[node] = graph.placeholder(str(node.target))
        elif node.name == enters:
            made[node] = arriving

    def copy(node: fx.Node) -> fx.Node:
        if node not in made:
            made[node] = graph.node_copy(node, copy)
        return made[node]

    for node in nodes[first : last + 1]:
        if node.op != "placeholder":
            copy(node)
    if value:
        graph.output(made[next(node for node in nodes if node.name == value)])
    else:
        graph.output(fx.map_arg(output.args[0], copy))
    for node in list(graph.nodes):
        # A module call may have side effects (BatchNorm's statistics); unused attributes do not.
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    return fx.GraphModule(traced, graph)
