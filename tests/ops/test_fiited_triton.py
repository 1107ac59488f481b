"""FIITED's Triton kernels in interpreter mode, in a process of their own, and their torch twins."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from raysys import machine
from raysys.ops import fiited_gather as twin
from raysys.training.fiited import FiitedConfig, FiitedStore, TableSpec

PROGRAM = """
import torch
from raysys.ops import fiited_gather as twin
kernel = twin.device_kernels()
generator = torch.Generator().manual_seed(0)
for n, k, chunk in ((5, 4, 16), (7, 3, 4), (1, 1, 8), (0, 4, 4)):
    pool = torch.randn(n * k + 1, chunk, generator=generator)
    pool[0] = 0
    refs = torch.randperm(n * k, generator=generator).reshape(n, k).to(torch.int32) + 1
    refs[torch.rand(n, k, generator=generator) < 0.4] = 0
    assert torch.equal(kernel.gather(pool, refs), twin.gather(pool, refs))
    states = []
    grads = torch.randn(n, k * chunk, generator=generator)
    for module in (kernel, twin):
        mine, acc, utility = pool.clone(), torch.full((n,), 0.5), torch.ones(n, k)
        module.adagrad_step(mine, refs, grads, acc, utility, 0.1, 1e-8)
        assert not mine[0].any()
        states.append((mine, acc, utility))
    for ours, theirs in zip(*states):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
print("equal")
"""


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: nothing to check"
)
def test_triton_kernels_equal_their_twins_in_interpreter_mode() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=machine.app_root(), env=environment,
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "equal" in done.stdout


def test_the_twin_steps_like_the_store() -> None:
    """Chunk-addressed rows of a store, stepped by the twin, equal the store's own update."""
    config = FiitedConfig(
        chunk=4, shape="free", budget_slots=64, admit_after=0, cadence="manual", slack=0.0
    )
    store = FiitedStore(config, (TableSpec(name="a", dim=16, rows=8),), engine="native")
    ids = np.arange(8)
    out, batch = store.lookup([ids], train=True)
    pool = torch.cat([torch.zeros(1, 4), torch.from_numpy(out.copy()).reshape(-1, 4)])
    refs = torch.arange(1, 33, dtype=torch.int32).reshape(8, 4)
    grad = np.random.default_rng(0).normal(size=out.shape).astype(np.float32)
    store.update(batch, grad)
    utility = torch.zeros(8, 4)
    twin.adagrad_step(
        pool, refs, torch.from_numpy(grad), torch.zeros(8), utility, config.lr, config.eps
    )
    expected = store.export_dense("a", ids)
    np.testing.assert_allclose(twin.gather(pool, refs).numpy(), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(utility.numpy(), store.utility("a", ids), rtol=1e-5)
