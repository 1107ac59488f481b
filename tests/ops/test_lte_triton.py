"""LTE's Triton kernels in interpreter mode, in a process of their own (the mode is set at
import).
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from raysys import machine

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: nothing to check"
)
COMMON = """
import torch
from raysys.ops import lte_cuda, lte_ops
from raysys.ops import lte_reference as reference
from raysys.ops.kernels import load_kernel
kernel = load_kernel("lte_ffn_triton")
generator = torch.Generator().manual_seed(0)

def layer(d, size, experts, dtype=torch.float32, gated=True):
    f = size * experts
    w_in = torch.randn((2 if gated else 1) * f, d, generator=generator) / d**0.5
    w_out = torch.randn(f, d, generator=generator) / f**0.5
    wr, br = (torch.randn(*shape, generator=generator) for shape in ((experts, d), (experts,)))
    return w_in.to(dtype), w_out.to(dtype), torch.randn(len(w_in), generator=generator), wr, br

def wanted(x, w_in, w_out, bias, wr, br, threshold, kind):
    parts = [None if t is None else t.double() for t in (x, w_in, w_out, bias)]
    gated = len(w_in) != len(w_out)
    return reference.ffn(*parts, wr, br, threshold, kind, gated=gated)
"""
EQUAL = """
half = torch.float16
cases = (
    ("few", 1, 40, 8, 6, 0.0, torch.float32, "silu", True),
    ("few", 3, 33, 4, 18, 0.5, torch.float32, "gelu", False),
    ("few", 2, 16, 16, 3, -1e9, torch.float32, "relu", True),
    ("few", 2, 64, 8, 5, 0.0, half, "gelu_tanh", True),
    ("grouped", 5, 40, 16, 3, 0.0, torch.float32, "silu", True),
    ("grouped", 19, 70, 16, 5, 0.5, torch.float32, "gelu_tanh", False),
    ("grouped", 17, 16, 32, 2, -1e9, torch.float32, "gelu", True),
    ("grouped", 4, 64, 16, 4, 1e9, torch.float32, "silu", True),
    ("grouped", 9, 64, 32, 3, 0.0, half, "silu", True),
    ("dense", 6, 33, 6, 5, 0.0, torch.float32, "silu", True),
    ("dense", 3, 16, 5, 3, 0.5, torch.float32, "relu", False),
)
for way, tokens, d, size, experts, threshold, dtype, kind, gated in cases:
    w_in, w_out, bias, wr, br = layer(d, size, experts, dtype, gated)
    x = torch.randn(tokens, d, generator=generator).to(dtype)
    loose = 1e-2 if dtype == half else 1e-5
    for b, r in ((None, None), (bias, br)):
        arguments = (x, w_in, w_out, b, wr, r, threshold, kind)
        got = kernel.ffn(*arguments, way)
        torch.testing.assert_close(got.double(), wanted(*arguments), rtol=loose, atol=loose)
        assert torch.equal(got, kernel.ffn(*arguments, way)), way
for way, size in (("few", 3), ("grouped", 8)):
    w_in, w_out, _, wr, _ = layer(16, size, 2)
    try:
        kernel.ffn(torch.zeros(2, 16), w_in, w_out, None, wr, None, 0.0, "silu", way)
    except ValueError as error:
        assert "powers of two" in str(error)
    else:
        raise SystemExit(f"{way} took experts of {size}")
"""
OPERATOR = """
w_in, w_out, bias, wr, br = layer(24, 16, 3)
for tokens, way in ((1, "sparse"), (5, "grouped"), (40, "dense")):
    x = torch.randn(tokens, 24, generator=generator)
    before = dict(lte_ops.PATHS.tokens)
    lte_ops.set_offset(0.25)
    got = lte_ops._ffn_cuda(x[None], w_in, w_out, None, wr, br, 0.0, "silu")
    lte_ops.set_offset(0.0)
    assert got.shape == (1, tokens, 24)
    expected = wanted(x, w_in, w_out, None, wr, br, 0.25, "silu")
    torch.testing.assert_close(got[0].double(), expected, rtol=1e-5, atol=1e-5)
    assert lte_ops.PATHS.tokens[way] == before[way] + tokens, way
empty = lte_ops._ffn_cuda(torch.zeros(0, 24), w_in, w_out, None, wr, br, 0.0, "silu")
assert empty.shape == (0, 24)
"""


def test_every_way_and_the_operator_equal_the_reference_in_interpreter_mode() -> None:
    """The operator through the function registered for CUDA: the interpreter takes CPU tensors."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    program = COMMON + EQUAL + OPERATOR + "\nprint('equal')"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=machine.app_root(), env=environment,
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "equal" in done.stdout


def test_a_way_is_chosen_by_batch_and_shape() -> None:
    from raysys.ops.lte_cuda import way_of

    assert [way_of(tokens, 48, 32) for tokens in (1, 4, 5, 32, 33)] == [
        "few", "few", "grouped", "grouped", "dense",
    ]  # fmt: skip
    assert way_of(1, 48, 24) == "dense"  # not a power of two
    assert way_of(8, 48, 8) == "dense"  # too small for a product of tiles
    assert way_of(1, 2048, 32) == "dense"
