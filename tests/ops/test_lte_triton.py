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

PROGRAM = """
import torch
from raysys.ops import lte_reference as reference
from raysys.ops.kernels import load_kernel
kernel = load_kernel("lte_ffn_triton")
generator = torch.Generator().manual_seed(0)
for tokens, d, size, experts, threshold, dtype in (
    (1, 40, 8, 6, 0.0, torch.float32), (3, 33, 4, 40, 0.5, torch.float32),
    (2, 16, 16, 3, -1e9, torch.float32), (2, 16, 16, 3, 1e9, torch.float32),
    (2, 64, 8, 5, 0.0, torch.float16),
):
    f = size * experts
    x = torch.randn(tokens, d, generator=generator).to(dtype)
    w_in = (torch.randn(2 * f, d, generator=generator) / d**0.5).to(dtype)
    w_out = (torch.randn(f, d, generator=generator) / f**0.5).to(dtype)
    wr = torch.randn(experts, d, generator=generator)
    br = torch.randn(experts, generator=generator)
    for bias in (None, br):
        got = kernel.ffn(x, w_in, w_out, wr, bias, threshold)
        wanted = reference.ffn(x.double(), w_in.double(), w_out.double(), None, wr, bias, threshold)
        torch.testing.assert_close(got.double(), wanted, rtol=1e-2 if dtype == torch.float16
        else 1e-5,                            atol=1e-2 if dtype == torch.float16 else 1e-6)
        assert torch.equal(got, kernel.ffn(x, w_in, w_out, wr, bias, threshold))
try:
    kernel.ffn(x, w_in[:30], w_out[:15], wr, None, 0.0)
except ValueError as error:
    assert "powers of two" in str(error)
else:
    raise SystemExit("a size of three was taken")
print("equal")
"""


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: nothing to check"
)
def test_triton_kernels_equal_the_reference_in_interpreter_mode() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=machine.app_root(), env=environment,
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "equal" in done.stdout
