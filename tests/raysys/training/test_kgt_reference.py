"""Plasticity by Gram matrices, and the precision of the reference model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from raysys.errors import CapabilityError
from raysys.training.kgt import models, quantise
from raysys.training.kgt.plan import parse
from raysys.training.kgt.plasticity import gram, sp_loss, subsample
from raysys.training.kgt.reference import SegmentReference


def test_gram_and_loss_by_hand() -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    b = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert torch.allclose(gram(a), torch.eye(2), atol=1e-6)
    # b: Gram all ones, rows divided by sqrt(2). Differences 1 - s, s, s, 1 - s over four entries.
    s = 2**-0.5
    assert sp_loss(gram(a), gram(b)) == pytest.approx((2 * (1 - s) ** 2 + 2 * s**2) / 4, rel=1e-5)
    assert sp_loss(gram(a), gram(3 * a)) == pytest.approx(0.0, abs=1e-12)


@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 99))
def test_loss_is_symmetric_bounded_and_blind_to_scale(rows: int, width: int, seed: int) -> None:
    one, two = torch.randn(2, rows, width, generator=torch.Generator().manual_seed(seed))
    loss = sp_loss(gram(one), gram(two))
    assert loss is not None
    assert 0 <= loss <= 4 / rows + 1e-6
    assert loss == pytest.approx(sp_loss(gram(two), gram(one)))
    assert loss == pytest.approx(sp_loss(gram(5 * one), gram(two)), abs=1e-6)


def test_readings_without_meaning_are_none() -> None:
    assert sp_loss(gram(torch.ones(1, 3)), gram(torch.ones(1, 3))) is None
    assert sp_loss(gram(torch.ones(2, 3)), gram(torch.ones(3, 3))) is None
    assert sp_loss(gram(torch.full((2, 3), float("nan"))), gram(torch.ones(2, 3))) is None
    assert sp_loss(gram(torch.zeros(2, 3)), gram(torch.zeros(2, 3))) == 0.0
    assert subsample(100, 64) == slice(0, 64)


def chain() -> tuple[list[nn.Module], Tensor]:
    torch.manual_seed(0)
    model = models.ResNet(3, widths=(4, 8), dimensions=2)
    x = torch.randn(8, 1, 8, 8)
    plan = parse(model, (x,), modules=16)
    model.eval()
    return [module.segment for module in plan.modules[:-1] if module.segment is not None], x


@pytest.mark.parametrize("precision", ["fx_int8", "bf16", "fp32"])
def test_every_precision_agrees_with_fp32_gram_matrices(precision: str) -> None:
    segments, x = chain()
    reference = SegmentReference(precision)
    reference.build(dict(enumerate(segments)), (x,), None)
    wanted = list(range(len(segments)))
    found = reference.grams((x,), None, 0, wanted)
    assert reference.precision == precision, reference.notes
    value: Any = None
    with torch.no_grad():
        for index, segment in enumerate(segments):
            value = segment(value, x)
            error = float((found[index] - gram(value)).norm() / gram(value).norm())
            assert error < (1e-6 if precision == "fp32" else 0.05)


def test_a_precision_that_fails_falls_back_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> nn.Module:
        raise RuntimeError("no kernel for this operation")

    monkeypatch.setattr(quantise, "_static_int8", broken)
    monkeypatch.setattr(quantise, "_fast_bf16", lambda: False)
    segments, x = chain()
    reference = SegmentReference("fx_int8")
    reference.build(dict(enumerate(segments)), (x,), None)
    assert reference.precision == "fp32"
    assert "no kernel for this operation" in reference.notes[0]
    assert reference.grams((x,), None, 0, [0])


def test_auto_counts_the_build_cost_over_the_period() -> None:
    segments, x = chain()
    precision, trials = quantise.choose(segments, (x,), None, evaluations=3)
    best = min(trials, key=lambda t: t.build_s + 3 * t.run_s if t.error < 0.05 else 1e9)
    assert precision == best.precision
    assert {trial.precision for trial in trials} >= {"fp32", "fx_int8"}


def test_linear_layers_quantise_dynamically() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(4, 8)
    made = quantise.convert(module, "dynamic_int8", ())
    assert quantise.candidates([module])[0] == "dynamic_int8"
    assert torch.allclose(made(x), module(x).detach(), atol=0.1)
    assert not torch.equal(made(x), module(x).detach())


def test_the_reference_is_a_snapshot_and_covers_only_what_was_built() -> None:
    segments, x = chain()
    reference = SegmentReference("fp32")
    reference.build({0: segments[0]}, (x,), None)
    before = reference.grams((x,), None, 0, [0])[0]
    with torch.no_grad():
        next(segments[0].parameters()).add_(torch.randn(1))
    assert torch.equal(before, reference.grams((x,), None, 0, [0])[0])
    assert reference.grams((x,), None, 0, [1]) == {}
    copy = SegmentReference("fp32")
    copy.load_state_dict(reference.state_dict(), dict(enumerate(segments)))
    assert torch.equal(before, copy.grams((x,), None, 0, [0])[0])


def test_a_model_that_cannot_be_copied_is_a_missing_capability() -> None:
    class Locked(nn.Linear):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("cannot pickle a lock")

    with pytest.raises(CapabilityError, match="cannot be copied"):
        SegmentReference("fp32").build({0: Locked(2, 2)}, (torch.ones(2, 2),), None)
