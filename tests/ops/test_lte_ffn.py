"""LTE's kernels against a float64 reference, over shapes, types, densities and instruction sets."""

from __future__ import annotations

import concurrent.futures
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raysys.errors import ConfigError
from raysys.ops import lte_crossover, lte_ops
from raysys.ops import lte_reference as reference
from raysys.ops.lte_native import ISAS, NativeLayer, best_isa

EPSILON = {dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.float32, torch.bfloat16)}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def weights(
    d: int, f: int, n: int, dtype: torch.dtype, *, gated: bool = True, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    w_in = torch.randn((2 if gated else 1) * f, d, generator=generator) / d**0.5
    w_out = torch.randn(f, d, generator=generator) / f**0.5
    return w_in.to(dtype), w_out.to(dtype), torch.randn(n, d, generator=generator)


@settings(max_examples=40)
@given(
    rows=st.integers(1, 9),
    d=st.integers(1, 70),
    size=st.integers(1, 9),
    experts=st.integers(1, 7),
    threshold=st.sampled_from([-1e9, -1.0, 0.0, 2.0, 1e9]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    kind=st.sampled_from(reference.ACTIVATIONS),
    gated=st.booleans(),
    isa=st.integers(0, best_isa()),
    threads=st.sampled_from([1, 2, 9]),
)
def test_kernel_equals_reference(
    rows: int, d: int, size: int, experts: int, threshold: float, dtype: torch.dtype, kind: str,
    gated: bool, isa: int, threads: int,
) -> None:  # fmt: skip
    w_in, w_out, wr = weights(d, size * experts, experts, dtype, gated=gated)
    x = torch.randn(rows, d, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.linspace(-1, 1, len(w_in))
    br = torch.linspace(-0.5, 0.5, experts)
    layer = NativeLayer(w_in, w_out, bias, wr, br, kind, isa=isa)
    offsets, tokens = layer.route(x, threshold, threads)
    logits = x.double() @ wr.double().T + br.double()
    mask = reference.to_mask(offsets, tokens, rows)
    sure = (logits - threshold).abs() > 1e-4
    assert torch.equal(mask[sure], (logits > threshold)[sure])
    parts = [t.double() for t in (x, w_in, w_out, bias)]
    expected = reference.masked(*parts, mask, kind, gated=gated)  # type: ignore[arg-type]
    got = layer.masked(x, offsets, tokens, threads)
    # Sums of terms that cancel have their terms' rounding errors: relu of magnitudes bounds them.
    sizes = [t.abs() for t in parts]
    bound = reference.masked(*sizes, mask, "relu", gated=gated)  # type: ignore[arg-type]
    allowed = TOLERANCE[dtype] * float(expected.norm()) + 2 * EPSILON[dtype] * float(bound.norm())
    assert float((got.double() - expected).norm()) <= allowed
    through_dense = layer.dense(x, offsets, tokens, threads)
    assert float((through_dense.double() - expected).norm()) <= allowed
    again, count = layer.ffn(x, threshold, threads)
    assert torch.equal(again, got)
    assert count == len(tokens)


def test_every_instruction_set_of_this_machine_is_used() -> None:
    w_in, w_out, wr = weights(64, 64, 4, torch.bfloat16)
    x = torch.randn(3, 64).bfloat16()
    found = [
        NativeLayer(w_in, w_out, None, wr, None, isa=i).ffn(x, 0.0, 1)[0]
        for i in range(best_isa() + 1)
    ]
    assert len(found) <= len(ISAS)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=2e-2, atol=2e-2)
    with pytest.raises(ConfigError, match="isa"):
        NativeLayer(w_in, w_out, None, wr, None, isa=len(ISAS))


def test_huge_inputs_and_nan_logits_switch_experts_cleanly() -> None:
    w_in, w_out, wr = weights(16, 16, 4, torch.float32)
    x = torch.full((1, 16), 1e4)
    wr[0] = float("nan")
    offsets, _ = NativeLayer(w_in, w_out, None, wr, None).route(x, 0.0, 1)
    assert int(offsets[1] - offsets[0]) == 0  # NaN is not above the threshold
    wr[0] = 0.0
    exactly, _ = NativeLayer(w_in, w_out, None, wr, None).route(x, 0.0, 1)
    assert int(exactly[1] - exactly[0]) == 0  # exactly at the threshold is off


def test_operators_take_any_layout_and_empty_batches() -> None:
    w_in, w_out, wr = weights(24, 32, 4, torch.float32)
    x = torch.randn(2, 5, 24)
    whole = lte_ops.ffn(x, w_in, w_out, None, wr, None, 0.0, "silu")
    assert whole.shape == x.shape
    flat = reference.ffn(x.reshape(-1, 24), w_in, w_out, None, wr, None, 0.0)
    torch.testing.assert_close(whole.reshape(-1, 24), flat, rtol=1e-5, atol=1e-5)
    strided = x.transpose(0, 1)
    torch.testing.assert_close(
        lte_ops.ffn(strided, w_in, w_out, None, wr, None, 0.0, "silu"), whole.transpose(0, 1)
    )
    expanded = x[:1, :1].expand(3, 2, 24)
    got = lte_ops.ffn(expanded, w_in, w_out, None, wr, None, 0.0, "silu")
    torch.testing.assert_close(got, whole[:1, :1].expand(3, 2, 24), rtol=1e-4, atol=1e-5)
    assert lte_ops.ffn(x[:0], w_in, w_out, None, wr, None, 0.0, "silu").shape == (0, 5, 24)
    off = lte_ops.ffn(x, w_in, w_out, None, wr, None, 1e9, "silu")
    assert not off.any()


def test_operators_pass_torchs_own_checks_and_compile() -> None:
    w_in, w_out, wr = weights(16, 16, 4, torch.float32)
    x = torch.randn(3, 16)
    arguments = (x, w_in, w_out, None, wr, None, 0.0, "silu")
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(lte_ops.ffn_operator, arguments, test_utils=utilities)
    offsets, tokens = lte_ops.route(x, wr, None, 0.0)
    torch.library.opcheck(lte_ops.route, (x, wr, None, 0.0), test_utils=utilities)
    masked = (x, w_in, w_out, None, offsets, tokens, "silu")
    torch.library.opcheck(lte_ops.ffn_masked, masked, test_utils=utilities)
    plain = lte_ops.ffn(*arguments)
    assert torch.equal(lte_ops.ffn_masked(*masked), plain)
    compiled = torch.compile(lambda x: lte_ops.ffn(x, *arguments[1:]) + 1, backend="eager")
    with torch.inference_mode():
        assert torch.equal(compiled(x), plain + 1)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lte_ops.ffn(*arguments), plain)


def test_wrong_shapes_types_and_devices_are_refused() -> None:
    w_in, w_out, wr = weights(16, 16, 4, torch.float32)
    x = torch.randn(3, 16)
    with pytest.raises(ConfigError, match="x:"):
        lte_ops.ffn(x.bfloat16(), w_in, w_out, None, wr, None, 0.0, "silu")
    with pytest.raises(ConfigError, match="last axis"):
        lte_ops.ffn(x[:, :8], w_in, w_out, None, wr, None, 0.0, "silu")
    with pytest.raises(ConfigError, match="wr"):
        lte_ops.ffn(x, w_in, w_out, None, wr.T.contiguous(), None, 0.0, "silu")
    with pytest.raises(ConfigError, match="w_out"):
        lte_ops.ffn(x, w_in, w_out.bfloat16(), None, wr, None, 0.0, "silu")
    with pytest.raises(ConfigError, match="contiguous CPU tensor"):
        NativeLayer(w_in.to("meta"), w_out, None, wr, None)
    with pytest.raises(ConfigError, match="activation"):
        lte_ops.ffn(x, w_in, w_out, None, wr, None, 0.0, "mish")


def test_calls_from_several_threads_and_two_expert_sizes() -> None:
    generator = torch.Generator().manual_seed(0)
    layers, inputs, expected = [], [], []
    for index, experts in enumerate((4, 8)):
        layers.append(NativeLayer(*weights(64, 512, experts, torch.float32, seed=index)[:2], None,
                                  torch.randn(experts, 64, generator=generator), None))  # fmt: skip
        inputs.append(torch.randn(16, 64, generator=generator))
        expected.append(layers[-1].ffn(inputs[-1], 0.0, 2)[0])
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(layers[i % 2].ffn, inputs[i % 2], 0.0, 2) for i in range(60)]
        for i, job in enumerate(jobs):
            assert torch.equal(job.result()[0], expected[i % 2])


def test_crossover_is_measured_once_and_decides_the_path(tmp_path: Path) -> None:
    w_in, w_out, wr = weights(64, 128, 4, torch.float32)
    layer = NativeLayer(w_in, w_out, None, wr, None)
    measured = lte_crossover.calibrate(layer, tmp_path, largest=4)
    assert set(measured.density) == set(lte_crossover.BUCKETS)
    assert all(0.0 <= value <= 1.0 for value in measured.density.values())
    assert lte_crossover.crossover_of(layer, tmp_path) == measured
    (file,) = (tmp_path / "lte").iterdir()
    file.write_text("damaged")
    assert lte_crossover.crossover_of(layer, tmp_path).threads == 0
    never = lte_crossover.Crossover(dict.fromkeys(lte_crossover.BUCKETS, 0.0), 1)
    assert never.most(100, 4, 1) == 0
    assert never.most(1, 4, 2) == 4  # another number of threads: the default


def test_dense_and_sparse_paths_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    w_in, w_out, wr = weights(64, 128, 4, torch.float32)
    x = torch.randn(8, 64)
    sparse = lte_ops.ffn(x, w_in, w_out, None, wr, None, 0.0, "silu")
    layer, _ = lte_ops.prepared(w_in, w_out, None, wr, None, "silu")
    never = lte_crossover.Crossover(
        dict.fromkeys(lte_crossover.BUCKETS, 0.0), torch.get_num_threads()
    )
    monkeypatch.setattr(lte_ops, "prepared", lambda *_: (layer, never))
    before = lte_ops.PATHS.tokens["dense"]
    torch.testing.assert_close(lte_ops.ffn(x, w_in, w_out, None, wr, None, 0.0, "silu"), sparse)
    assert lte_ops.PATHS.tokens["dense"] == before + 8


def test_without_a_compiler_the_torch_path_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    w_in, w_out, wr = weights(16, 16, 4, torch.float32)
    x = torch.randn(3, 16)
    native = lte_ops.ffn(x, w_in, w_out, None, wr, None, 0.0, "silu")
    monkeypatch.setattr(lte_ops, "native_available", lambda: False)
    torch.testing.assert_close(lte_ops.ffn(x, w_in, w_out, None, wr, None, 0.0, "silu"), native)
