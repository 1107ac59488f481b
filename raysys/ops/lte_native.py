"""Calls ``kernels/lte_ffn.cpp``: LTE's FFN on a CPU with the best instruction set of the
machine.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from raysys.errors import ConfigError
from raysys.ops.lte_reference import ACTIVATIONS
from raysys.ops.native import compile_and_load

ISAS = ("portable", "avx2", "avx512", "avx512bf16")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_POINTER = ctypes.c_void_p
_LONG = ctypes.c_int64
_INT = ctypes.c_int


class LayerStruct(ctypes.Structure):
    """``lte::Layer`` of ``kernels/lte_types.h``."""

    _fields_ = [
        *[(name, _POINTER) for name in ("w_in", "w_out", "bias", "wr", "br")],
        *[(name, _LONG) for name in ("d", "f", "E", "n")],
        *[(name, ctypes.c_int32) for name in ("act", "gated", "dtype", "router_dtype")],
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernel; one library holds every instruction set.

    Raises:
        CapabilityError: there is no C++ compiler.
    """
    lib = compile_and_load("lte_ffn", "portable")
    layer = ctypes.POINTER(LayerStruct)
    lib.lte_route.restype = _LONG
    lib.lte_route.argtypes = [
        layer, _POINTER, _LONG, ctypes.c_float, _INT, _INT, _POINTER, _POINTER,
    ]  # fmt: skip
    lib.lte_masked.restype = None
    lib.lte_masked.argtypes = [
        layer, _POINTER, _LONG, _INT, _INT, _POINTER, _POINTER, _POINTER,
    ]  # fmt: skip
    lib.lte_activate.restype = None
    lib.lte_activate.argtypes = [
        layer, _POINTER, _POINTER, _LONG, _INT, _INT, _POINTER, _POINTER,
    ]  # fmt: skip
    lib.lte_ffn.restype = _LONG
    lib.lte_ffn.argtypes = [
        layer, _POINTER, _LONG, ctypes.c_float, _INT, _INT, _LONG, _POINTER,
    ]  # fmt: skip
    return lib


@functools.cache
def best_isa() -> int:
    """Index into :data:`ISAS` of the best that this processor runs."""
    return int(library().lte_best_isa())


@dataclass(slots=True, eq=False)
class NativeLayer:
    """One layer's weights, ready for the kernel; keeps them alive.

    Args:
        w_in: [F, D], or [2 F, D] with the gate's rows first; float32 or bfloat16.
        w_out: [F, D], same type.
        bias: float32 [rows of w_in] or None.
        wr, br: router [N, D] float32 or bfloat16, and float32 [N] or None.
        kind: activation.
        isa: index into :data:`ISAS`; None takes the best.

    Raises:
        ConfigError: shapes or types do not fit together.
    """

    w_in: Tensor
    w_out: Tensor
    bias: Tensor | None
    wr: Tensor
    br: Tensor | None
    kind: str = "silu"
    isa: int | None = None
    struct: Any = None
    _where: Any = None
    _gate: Any = None  # views of w_in
    _up: Any = None

    def __post_init__(self) -> None:
        neurons, hidden = self.w_out.shape
        experts = self.wr.shape[0]
        gated = self.w_in.shape[0] == 2 * neurons
        self._check(neurons, hidden, experts)
        if self.isa is None:
            self.isa = best_isa()
        if not 0 <= self.isa <= best_isa():
            raise ConfigError("isa", self.isa, f"0 to {best_isa()} on this machine")
        self.struct = LayerStruct(
            self.w_in.data_ptr(), self.w_out.data_ptr(), _address(self.bias), self.wr.data_ptr(),
            _address(self.br), hidden, neurons, neurons // experts, experts,
            ACTIVATIONS.index(self.kind), int(gated), _DTYPES[self.w_in.dtype],
            _DTYPES[self.wr.dtype],
        )  # fmt: skip
        self._where = ctypes.byref(self.struct)
        self._gate = self.w_in[:neurons]
        self._up = self.w_in[neurons:] if gated else None

    def _check(self, neurons: int, hidden: int, experts: int) -> None:
        for name in ("w_in", "w_out", "wr"):
            tensor = getattr(self, name)
            found = (tensor.dtype, str(tensor.device), tensor.is_contiguous())
            if tensor.dtype not in _DTYPES or tensor.device.type != "cpu" or not found[2]:
                raise ConfigError(name, found, "a contiguous CPU tensor, float32 or bfloat16")
        if self.w_in.shape not in ((neurons, hidden), (2 * neurons, hidden)):
            raise ConfigError("w_in", tuple(self.w_in.shape), f"({neurons} or twice, {hidden})")
        if self.w_in.dtype != self.w_out.dtype:
            raise ConfigError("w_out", self.w_out.dtype, f"{self.w_in.dtype}, as w_in")
        if experts == 0 or neurons % experts or self.wr.shape != (experts, hidden):
            remedy = "A router has one row per expert, and experts are of equal size"
            raise ConfigError(
                "wr", tuple(self.wr.shape), f"(a divisor of {neurons}, {hidden})", remedy
            )
        for name, rows in (("bias", self.w_in.shape[0]), ("br", experts)):
            tensor = getattr(self, name)
            if tensor is not None and (
                tensor.dtype != torch.float32
                or tensor.shape != (rows,)
                or not tensor.is_contiguous()
            ):
                raise ConfigError(name, tuple(tensor.shape), f"float32 ({rows},)")
        if self.kind not in ACTIVATIONS:
            raise ConfigError("activation", self.kind, f"one of {ACTIVATIONS}")

    def rows(self, x: Tensor) -> Tensor:
        """x as a contiguous [T, D] of the weights' type.

        Raises:
            ConfigError: another width or type.
        """
        self.check(x)
        return x.reshape(-1, x.shape[-1]).contiguous()

    def check(self, x: Tensor) -> None:
        """Refuse an x of another width or type.

        Raises:
            ConfigError: another width or type.
        """
        if x.shape[-1] != self.struct.d:
            raise ConfigError("x", tuple(x.shape), f"a last axis of {self.struct.d}")
        if x.dtype != self.w_in.dtype or x.device.type != "cpu":
            raise ConfigError(
                "x", f"{x.dtype} on {x.device}", f"{self.w_in.dtype} on cpu, as weights"
            )

    def route(self, x: Tensor, threshold: float, threads: int) -> tuple[Tensor, Tensor]:
        """Expert-to-token lists of x [T, D]; see :func:`raysys.ops.lte_reference.route`."""
        x = self.rows(x)
        offsets = torch.empty(self.struct.n + 1, dtype=torch.int32)
        tokens = torch.empty(len(x) * self.struct.n, dtype=torch.int32)
        count = library().lte_route(
            self._where, x.data_ptr(), len(x), threshold, self.isa, threads,
            offsets.data_ptr(), tokens.data_ptr(),
        )  # fmt: skip
        return offsets, tokens[:count]

    def masked(self, x: Tensor, offsets: Tensor, tokens: Tensor, threads: int) -> Tensor:
        """y [T, D] of given lists."""
        x = self.rows(x)
        y = torch.empty_like(x)
        library().lte_masked(
            self._where, x.data_ptr(), len(x), self.isa, threads, offsets.data_ptr(),
            tokens.data_ptr(), y.data_ptr(),
        )  # fmt: skip
        return y

    def dense(self, x: Tensor, offsets: Tensor, tokens: Tensor, threads: int) -> Tensor:
        """The same as :meth:`masked` by torch's dense products; faster where most experts are on.

        ``x`` must be contiguous [T, D] of the weights' type.
        """
        y = torch.empty_like(x)
        self._products(x, y, threads, (offsets.data_ptr(), tokens.data_ptr()))
        return y

    def ffn(
        self, x: Tensor, threshold: float, threads: int, most: int | None = None
    ) -> tuple[Tensor, int]:
        """Router and experts in one call: y of x's shape, and the number of pairs that were on.

        ``x`` must be contiguous [..., D] of the weights' type (see :meth:`check`): this is the
        fast path. Where more than ``most`` pairs are on, y comes from :meth:`dense`'s products;
        the lists stay inside the kernel, which costs less than handing them over.
        """
        y = torch.empty_like(x)
        hidden = x.shape[-1]
        rows = x.numel() // hidden
        most = rows * self.struct.n if most is None else most
        count = library().lte_ffn(
            self._where, x.data_ptr(), rows, threshold, self.isa, threads, most, y.data_ptr()
        )
        if count > most:
            self._products(x.view(rows, hidden), y.view(rows, hidden), threads, (None, None))
        return y, count

    def _products(
        self, x: Tensor, y: Tensor, threads: int, lists: tuple[int | None, int | None]
    ) -> None:
        """y [T, D] of addresses of lists; None stands for those that the kernel kept."""
        z = functional.linear(x, self._gate)
        up = None if self._up is None else functional.linear(x, self._up)
        library().lte_activate(
            self._where, z.data_ptr(), _address(up), len(x), self.isa, threads, *lists
        )
        torch.mm(z, self.w_out, out=y)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
