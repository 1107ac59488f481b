"""LTE's FFN as torch operators: opaque to ``torch.compile``, chosen between sparse and dense
per call.

``raysys_lte::ffn`` routes, then computes the chosen experts, or everything with a mask where
that is
faster: the router's answer is on the CPU anyway, so the choice uses the true density of the batch.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from raysys import machine
from raysys.errors import CapabilityError
from raysys.ops import lte_cuda
from raysys.ops import lte_reference as reference
from raysys.ops.lte_crossover import Crossover, crossover_of
from raysys.ops.lte_native import NativeLayer, library

_LOG = logging.getLogger(__name__)
_torch_library: Any = torch.library
_LIBRARY = _torch_library.Library("raysys_lte", "DEF")
_WEIGHTS = "Tensor w_in, Tensor w_out, Tensor? bias"
_LIBRARY.define(
    f"ffn(Tensor x, {_WEIGHTS}, Tensor wr, Tensor? br, float threshold, str kind) -> Tensor"
)
_LIBRARY.define("route(Tensor x, Tensor wr, Tensor? br, float threshold) -> (Tensor, Tensor)")
_LIBRARY.define(
    f"ffn_masked(Tensor x, {_WEIGHTS}, Tensor offsets, Tensor tokens, str kind) -> Tensor"
)
_LAYERS_KEPT = 4096


@functools.cache
def native_available() -> bool:
    """Whether the compiled kernel can be used here; says so once where it cannot."""
    try:
        library()
    except CapabilityError as error:
        _LOG.warning("LTE runs on its slower torch path: %s", error)
        return False
    return True


class Paths:
    """How many calls and tokens took which path in this process; for metrics."""

    def __init__(self) -> None:
        self.tokens = {"sparse": 0, "grouped": 0, "dense": 0}
        self.active = 0
        self.possible = 0

    def count(self, tokens: int, experts: int, active: int, *, dense: bool) -> None:
        """Note one call."""
        self.tokens["dense" if dense else "sparse" if tokens == 1 else "grouped"] += tokens
        self.active += active
        self.possible += tokens * experts

    def note(self, tokens: int, way: str) -> None:
        """Note one call on a GPU, whose active experts stay there."""
        self.tokens[{"few": "sparse", "grouped": "grouped"}.get(way, "dense")] += tokens

    @property
    def density(self) -> float:
        """Share of (token, expert) pairs that were on since the start, of calls on the CPU."""
        return self.active / self.possible if self.possible else 0.0


PATHS = Paths()
_offset = [0.0]


def set_offset(offset: float) -> None:
    """Move the threshold of every layer of this process by ``offset`` logits (a server's budget).

    Read when an operator runs, so that compiled graphs follow it too.
    """
    _offset[0] = offset


def offset() -> float:
    """What :func:`set_offset` was given last."""
    return _offset[0]


_layers: dict[Any, tuple[NativeLayer, Crossover]] = {}


def threads() -> int:
    """Threads that a call uses: torch's own number."""
    return torch.get_num_threads()


def prepared(
    w_in: Tensor, w_out: Tensor, bias: Tensor | None, wr: Tensor, br: Tensor | None, kind: str
) -> tuple[NativeLayer, Crossover]:
    """The kernel's view of a layer's weights, made once per set of tensors."""
    key = (
        w_in.data_ptr(), w_out.data_ptr(), 0 if bias is None else bias.data_ptr(), wr.data_ptr(),
        0 if br is None else br.data_ptr(), w_in.shape, w_out.shape, wr.shape, w_in.dtype, wr.dtype,
        kind,
    )  # fmt: skip
    found = _layers.get(key)
    if found is None:
        if len(_layers) >= _LAYERS_KEPT:
            _layers.clear()
        # Detached aliases: the entry shares memory and keeps it alive, without any graph.
        parts = [None if t is None else t.detach() for t in (w_in, w_out, bias, wr, br)]
        layer = NativeLayer(parts[0], parts[1], parts[2], parts[3], parts[4], kind)  # type: ignore[arg-type]
        found = (layer, crossover_of(layer, machine.cache_dir()))
        _layers[key] = found
    return found


def forget(layer: NativeLayer) -> None:
    """Read the crossover of layers like this one again at their next call."""
    shape = (layer.struct.d, layer.struct.f, layer.struct.n)
    for key, (known, _) in list(_layers.items()):
        if (known.struct.d, known.struct.f, known.struct.n) == shape:
            del _layers[key]


def release() -> None:
    """Forget all prepared layers, so that their weights can be freed."""
    _layers.clear()


def _ffn_cpu(
    x: Tensor, w_in: Tensor, w_out: Tensor, bias: Tensor | None, wr: Tensor, br: Tensor | None,
    threshold: float, kind: str,
) -> Tensor:  # fmt: skip
    shape = x.shape
    if x.numel() == 0:
        return torch.empty_like(x)
    if not native_available():
        return _ffn_torch(
            x.reshape(-1, shape[-1]), w_in, w_out, bias, wr, br, threshold, kind
        ).view(shape)
    layer, crossover = prepared(w_in, w_out, bias, wr, br, kind)
    layer.check(x)
    count, experts = x.numel() // shape[-1], wr.shape[0]
    most = crossover.most(count, experts, threads())
    threshold += _offset[0]
    y, active = layer.ffn(x.contiguous(), threshold, threads(), most)
    PATHS.count(count, experts, active, dense=active > most)
    return y


def _ffn_torch(
    x: Tensor, w_in: Tensor, w_out: Tensor, bias: Tensor | None, wr: Tensor, br: Tensor | None,
    threshold: float, kind: str,
) -> Tensor:  # fmt: skip
    gated = _gated(w_in, w_out)
    return reference.ffn(x, w_in, w_out, bias, wr, br, threshold + _offset[0], kind, gated=gated)


def _ffn_cuda(
    x: Tensor, w_in: Tensor, w_out: Tensor, bias: Tensor | None, wr: Tensor, br: Tensor | None,
    threshold: float, kind: str,
) -> Tensor:  # fmt: skip
    if x.numel() == 0:
        return torch.empty_like(x)
    rows = x.reshape(-1, x.shape[-1])
    y, way = lte_cuda.ffn(rows, w_in, w_out, bias, wr, br, threshold + _offset[0], kind)
    PATHS.note(len(rows), way)
    return y.view(x.shape)


def _masked_cuda(
    x: Tensor, w_in: Tensor, w_out: Tensor, bias: Tensor | None, offsets: Tensor, tokens: Tensor,
    kind: str,
) -> Tensor:  # fmt: skip
    rows = x.reshape(-1, x.shape[-1])
    mask = reference.to_mask(offsets, tokens, len(rows))
    gated = _gated(w_in, w_out)
    return reference.masked(rows, w_in, w_out, bias, mask, kind, gated=gated).view(x.shape)


def _gated(w_in: Tensor, w_out: Tensor) -> bool:
    return w_in.shape[0] == 2 * w_out.shape[0]


def _ffn_fake(
    x: Tensor, w_in: Tensor, w_out: Tensor, bias: Tensor | None, wr: Tensor, br: Tensor | None,
    threshold: float, kind: str,
) -> Tensor:  # fmt: skip
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _route_cpu(x: Tensor, wr: Tensor, br: Tensor | None, threshold: float) -> tuple[Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if not native_available() or not len(rows):
        return reference.route(rows, wr, br, threshold)
    as_weights = wr.to(x.dtype).contiguous()  # only its type and shape are looked at
    return NativeLayer(as_weights, as_weights, None, wr, br).route(rows, threshold, threads())


def _route_fake(
    x: Tensor, wr: Tensor, br: Tensor | None, threshold: float
) -> tuple[Tensor, Tensor]:
    active = torch.library.get_ctx().new_dynamic_size()
    return (
        x.new_empty(wr.shape[0] + 1, dtype=torch.int32),
        x.new_empty(active, dtype=torch.int32),
    )


def _masked_cpu(
    x: Tensor, w_in: Tensor, w_out: Tensor, bias: Tensor | None, offsets: Tensor, tokens: Tensor,
    kind: str,
) -> Tensor:  # fmt: skip
    shape = x.shape
    if x.numel() == 0:
        return torch.empty_like(x)
    rows = x.reshape(-1, shape[-1]).contiguous()
    if not native_available():
        mask = reference.to_mask(offsets, tokens, len(rows))
        gated = _gated(w_in, w_out)
        return reference.masked(rows, w_in, w_out, bias, mask, kind, gated=gated).view(shape)
    router = w_in[: offsets.numel() - 1].contiguous()
    layer = NativeLayer(w_in, w_out, bias, router, None, kind)
    return layer.masked(rows, offsets, tokens, threads()).view(shape)


def _masked_fake(
    x: Tensor, w_in: Tensor, w_out: Tensor, bias: Tensor | None, offsets: Tensor, tokens: Tensor,
    kind: str,
) -> Tensor:  # fmt: skip
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_LIBRARY.impl("ffn", _ffn_cpu, "CPU")
_LIBRARY.impl("ffn", _ffn_cuda, "CUDA")
_LIBRARY.impl("route", _route_cpu, "CPU")
_LIBRARY.impl("route", reference.route, "CUDA")
_LIBRARY.impl("ffn_masked", _masked_cpu, "CPU")
_LIBRARY.impl("ffn_masked", _masked_cuda, "CUDA")
torch.library.register_fake("raysys_lte::ffn", _ffn_fake, lib=_LIBRARY)
torch.library.register_fake("raysys_lte::route", _route_fake, lib=_LIBRARY)
torch.library.register_fake("raysys_lte::ffn_masked", _masked_fake, lib=_LIBRARY)

ffn_operator = torch.ops.raysys_lte.ffn.default


def ffn(
    x: Tensor, w_in: Tensor, w_out: Tensor, bias: Tensor | None, wr: Tensor, br: Tensor | None,
    threshold: float, kind: str,
) -> Tensor:  # fmt: skip
    """y of x [..., D] (``raysys_lte::ffn``).

    Outside of ``torch.compile`` a plain CPU tensor goes straight to the kernel: the dispatcher
    costs some 15 us a call, which tells where a layer takes 200.

    Args:
        w_in, w_out, bias, wr, br, kind: as :class:`raysys.ops.lte_native.NativeLayer` has them.
        threshold: in logits.

    Raises:
        ConfigError: shapes, types or the activation do not fit.
    """
    eager = not torch.compiler.is_compiling() and type(x) is Tensor and x.is_cpu
    run = _ffn_cpu if eager and not x.requires_grad else ffn_operator
    y: Tensor = run(x, w_in, w_out, bias, wr, br, threshold, kind)
    return y


route = torch.ops.raysys_lte.route.default
ffn_masked = torch.ops.raysys_lte.ffn_masked.default
