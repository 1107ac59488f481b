"""LTE's core: grouping, gates, losses, controller, FLOPs, budgets; mostly by hand-made numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from raysys.training.lte import flops
from raysys.training.lte.adapters import find_ffns
from raysys.training.lte.budget import LoadBudget
from raysys.training.lte.config import ConvertConfig, StageConfig, threshold_logit
from raysys.training.lte.controller import ControllerConfig, SparsityController
from raysys.training.lte.errors import LTEConfigError, LTEDataError
from raysys.training.lte.fitting import fit_routers, land
from raysys.training.lte.gating import MODES, SparseModel, SparsityCount
from raysys.training.lte.grouping import group
from raysys.training.lte.losses import (
    distillation_sum,
    efficiency_sum,
    separability_floor,
    separability_sum,
    stack_scores,
)
from raysys.training.lte.pareto import hopeless, mark_pareto
from raysys.training.lte.text import TokenBlocks, corpus, to_bytes


def tiny(kind: str = "llama", **changes: Any) -> nn.Module:
    """A model of a supported family with two layers, hidden 16 and 32 neurons."""
    import transformers as t

    torch.manual_seed(0)
    common = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "llama":
        config: Any = t.LlamaConfig(
            **{**common, "intermediate_size": 32, "tie_word_embeddings": True, **changes}
        )
        return t.LlamaForCausalLM(config).eval()
    if kind == "gpt2":
        config = t.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_inner=32,
                              bos_token_id=0, eos_token_id=0, **changes)  # fmt: skip
        return t.GPT2LMHeadModel(config).eval()
    options = {**common, "intermediate_size": 32, "max_position_embeddings": 40, **changes}
    if kind == "roberta":
        return t.RobertaForSequenceClassification(t.RobertaConfig(**options)).eval()
    return t.BertForSequenceClassification(t.BertConfig(**options)).eval()


IDS = torch.arange(12).reshape(2, 6) + 5


@settings(max_examples=12)
@given(
    size=st.sampled_from([1, 3, 4]),
    count=st.integers(1, 6),
    width=st.integers(1, 9),
    seed=st.integers(0, 9),
)
def test_clusters_have_equal_size_and_are_the_same_for_a_seed(
    size: int, count: int, width: int, seed: int
) -> None:
    x = np.random.default_rng(seed).standard_normal((size * count, width)).astype(np.float32)
    found = group(x, size, seed=seed)
    assert np.bincount(found.labels, minlength=count).tolist() == [size] * count
    assert sorted(found.permutation.tolist()) == list(range(size * count))
    assert np.array_equal(found.labels, group(x, size, seed=seed).labels)


def test_degenerate_rows_still_make_whole_clusters() -> None:
    x = np.zeros((12, 5), np.float32)
    x[:4] = 1.0  # four equal rows, eight rows of zeros: fewer distinct rows than clusters
    assert np.bincount(group(x, 2).labels).tolist() == [2] * 6
    x[0, 0] = np.nan
    with pytest.raises(LTEDataError, match="NaN"):
        group(x, 2)
    with pytest.raises(LTEConfigError, match="divisor of the 12"):
        group(np.ones((12, 5), np.float32), 5)


def test_clusters_find_planted_groups() -> None:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((8, 24))
    truth = rng.permutation(np.repeat(np.arange(8), 4))
    x = (centres[truth] + 0.05 * rng.standard_normal((32, 24))).astype(np.float32)
    labels = group(x, 4).labels
    assert all(len(set(truth[labels == i].tolist())) == 1 for i in range(8))


def naive(model: nn.Module, sparse: SparseModel, layer: int, x: Tensor, mode: str) -> Tensor:
    """FFN of one token by a double loop over experts and neurons' groups."""
    ffn, gate = find_ffns(model)[layer], sparse.gates[layer]
    gate_rows, up_rows = ffn.rows(0), ffn.rows(1)
    y = torch.zeros_like(x)
    for i in range(gate.experts):
        score = torch.sigmoid(gate.router.weight[i] @ x)
        own = slice(i * gate.expert_size, (i + 1) * gate.expert_size)
        hidden = nn.functional.silu(gate_rows[own] @ x) * (up_rows[own] @ x)
        weight = {"dense": 1.0, "soft": score, "hard": float(score > 0.5),
                  "hard_scaled": float(score > 0.5) * score}[mode]  # fmt: skip
        y = y + weight * (ffn.columns()[own].T @ hidden)
    return y


@pytest.mark.parametrize("mode", ["dense", "soft", "hard", "hard_scaled"])
def test_forward_modes_equal_a_double_loop(mode: Any) -> None:
    model = tiny()
    sparse = SparseModel(model, ConvertConfig(expert_size=8))
    sparse.set_mode(mode)
    x = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        got = model.model.layers[1].mlp(x)[0]  # type: ignore[union-attr, index]
        for t in range(3):
            torch.testing.assert_close(
                got[t], naive(model, sparse, 1, x[0, t], mode), rtol=1e-4, atol=1e-6
            )


def test_top_k_scores_at_the_threshold_and_bad_modes() -> None:
    sparse = SparseModel(tiny(), ConvertConfig(expert_size=8))
    gate, x, a = sparse.gates[0], torch.zeros(2, 16), torch.ones(2, 32)
    z = torch.tensor([[0.0, 1.0, -1.0, 2.0], [1e4, -1e4, 0.1, 0.2]])
    sparse.set_mode("hard")
    assert gate.weights(x, z, a).tolist() == [[0, 1, 0, 1], [1, 0, 1, 1]]  # type: ignore[union-attr]
    sparse.set_mode("topk", top=1)
    assert gate.weights(x, z, a).tolist() == [[0, 0, 0, 1], [1, 0, 0, 0]]  # type: ignore[union-attr]
    sparse.set_mode("soft")
    assert bool(torch.isfinite(gate.weights(x, z, a)).all())  # type: ignore[arg-type]
    with pytest.raises(LTEConfigError, match="mode"):
        sparse.set_mode("softmax")  # type: ignore[arg-type]
    assert "dense" in MODES


def test_every_expert_off_passes_the_residual_only() -> None:
    model = tiny()
    sparse = SparseModel(model, ConvertConfig(expert_size=8, router_init="warm", warm_bias=-50.0))
    sparse.set_mode("hard")
    x = torch.randn(1, 2, 16)
    assert not bool(model.model.layers[0].mlp(x).any())  # type: ignore[union-attr, index]


def test_losses_by_hand() -> None:
    half = [torch.full((2, 4), 0.5), torch.full((2, 8), 0.5)]
    assert float(efficiency_sum(half)) / 2 == pytest.approx(0.25)
    ends = [torch.tensor([[0.0, 1.0, 0.0, 1.0]])]
    eps = 1e-2
    assert float(separability_sum(ends, 0.5, eps)) == pytest.approx(1 / (0.25 + eps))
    assert separability_floor(0.5, eps) == pytest.approx(1 / (0.25 + eps))
    assert float(separability_sum(half, 0.5, eps)) / 2 == pytest.approx(1 / eps)
    with pytest.raises(LTEConfigError, match="eps"):
        separability_sum(half, 0.5, 1e-9)
    valid = torch.tensor([[True, False]])
    (kept,) = stack_scores([torch.zeros(1, 2, 3)], valid)
    assert kept.shape == (1, 3)


def test_gradients_of_the_losses_against_finite_differences() -> None:
    z = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    for loss in (lambda g: efficiency_sum([g]), lambda g: separability_sum([g], 0.5, 1e-2)):
        assert torch.autograd.gradcheck(lambda z: loss(torch.sigmoid(z)), (z,))  # noqa: B023


def test_separability_stays_finite_in_half_precision_and_at_huge_logits() -> None:
    logits = [torch.tensor([[1e4, -1e4, 0.0]], dtype=torch.float16)]
    value = separability_sum(stack_scores(logits), 0.5, 1e-2)
    assert value.dtype == torch.float32
    assert bool(torch.isfinite(value))


def test_distillation_is_zero_for_equal_models_and_counts_valid_positions() -> None:
    a, b = torch.randn(1, 4, 7), torch.randn(1, 4, 7)
    every = torch.ones(1, 4, dtype=torch.bool)
    assert float(distillation_sum(a, a, every)) == pytest.approx(0.0, abs=1e-6)
    none = torch.zeros(1, 4, dtype=torch.bool)
    assert float(distillation_sum(a, b, none)) == 0.0
    assert float(distillation_sum(a, b, every)) > 0.0


def test_flops_of_the_papers_table() -> None:
    shape = flops.LLAMA_7B
    assert flops.paper(shape, routers=False) == pytest.approx(12.0625, abs=5e-5)
    assert 2 * shape.attention_weights / flops.GI == 4.0
    assert 2 * shape.ffn_weights / flops.GI == 8.0625
    assert 2 * shape.router_weights / flops.GI == pytest.approx(0.0840, abs=5e-5)
    for gflops, sparsity in ((5.38, 0.839), (4.65, 0.930), (6.59, 0.689)):
        assert flops.implied_sparsity(shape, gflops) == pytest.approx(sparsity, abs=5e-4)
    smol = flops.Shape(
        layers=30, hidden=576, neurons=1536, heads=9, kv_heads=3, head_size=64, vocabulary=49152
    )
    assert flops.ffn_read_share(smol) == pytest.approx(0.59, abs=0.005)
    assert [round(flops.amdahl(flops.ffn_read_share(smol), s), 2) for s in (0.5, 0.8, 0.9)] == [
        1.42,
        1.9,
        2.14,
    ]
    with pytest.raises(LTEConfigError):
        flops.paper(shape, 1.5)


def test_controller_pulls_towards_the_target_and_freezes() -> None:
    control = SparsityController(0.6, 1.0, 100, ControllerConfig(every=1))
    assert control.observe(0, 0.2) > 1.0
    state = control.state_dict()
    again = SparsityController(0.6, 5.0, 100, ControllerConfig(every=1))
    again.load_state_dict(state)
    assert again.observe(1, 0.9) == control.observe(1, 0.9)
    frozen = control.eta
    assert control.observe(95, 0.99) == frozen
    for _ in range(60):
        again.observe(2, 1.0)
    assert again.eta == pytest.approx(again.config.low)


def test_load_budget_moves_up_at_once_and_down_after_calm() -> None:
    budget = LoadBudget([(0, 0.0), (4, 1.0), (16, 2.0)], patience=3)
    assert [budget.step(t) for t in (1, 20, 2, 2, 2, 5)] == [0.0, 2.0, 2.0, 2.0, 0.0, 1.0]
    for bad in ([], [(4, 0.0)], [(0, 1.0), (4, 0.5)], [(0, float("nan"))]):
        with pytest.raises(LTEConfigError, match="levels"):
            LoadBudget(bad)


def test_pareto_set() -> None:
    rows = mark_pareto(
        [
            {"sparsity": 0.5, "nll": 1.0},
            {"sparsity": 0.6, "nll": 0.9},
            {"sparsity": 0.9, "nll": 2.0},
        ]
    )
    assert [row["pareto"] for row in rows] == [False, True, True]
    assert not mark_pareto([{"sparsity": 0.9, "nll": 1.0, "stopped": True}])[0]["pareto"]


def test_a_sweep_stops_points_that_are_clearly_beaten() -> None:
    pairs = ((0.2, 1.0), (0.5, 1.3), (0.6, 1.1), (0.6, 1.05), (0.8, 1.19), (0.7, 9.0))
    rows = [{"sparsity": sparsity, "nll": nll} for sparsity, nll in pairs]
    assert hopeless(rows, 0.1) == [False, True, False, False, False, True]
    assert hopeless(rows, 0.0) == [False, True, True, False, False, True]
    assert not any(hopeless(rows, math.inf))
    with pytest.raises(LTEConfigError, match="stop_margin"):
        hopeless(rows, math.nan)


def test_sparsity_counts_valid_tokens_only() -> None:
    count = SparsityCount.empty(1)
    weights = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    count.add(0, weights, torch.tensor([[True, False]]))
    assert count.overall == 0.5
    count.add(0, weights)
    assert count.per_layer == [pytest.approx(1 - 2 / 6)]


def test_fitted_routers_reach_the_sparsity_and_landing_corrects_it() -> None:
    sparse = SparseModel(tiny(), ConvertConfig(expert_size=4, router_init="warm"))
    blocks = TokenBlocks(np.arange(640) % 64, 16)
    batches = blocks.all_batches(8)
    fit_routers(sparse, batches, 0.7)
    assert abs(land(sparse, batches, 0.7)) < 1e-2  # already there on the same text
    land(sparse, batches, 0.3)
    sparse.set_mode("hard")
    from raysys.training.lte.evaluation import evaluate

    assert evaluate(sparse, batches).sparsity.overall == pytest.approx(0.3, abs=0.01)
    plain = SparseModel(tiny(), ConvertConfig(expert_size=4))
    with pytest.raises(LTEConfigError, match="bias"):
        fit_routers(plain, batches, 0.5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("eta", -1.0), ("eta", math.nan), ("lam", -0.1), ("lam", math.nan), ("eps", 1e-9),
        ("target_sparsity", 1.0), ("target_sparsity", -0.1), ("stage", 3), ("scope", "some"),
        ("lam_schedule", "cosine"), ("steps", 0), ("batch", 0), ("distil", 1.5),
        ("temperature", 0.0), ("threshold_offsets", ()), ("threshold_offsets", (math.inf,)),
    ],
)  # fmt: skip
def test_stage_options_are_checked(field: str, value: Any) -> None:
    with pytest.raises(LTEConfigError, match=field):
        StageConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("expert_size", 0), ("threshold", 0.0), ("threshold", 1.0), ("threshold", math.nan),
     ("grouping", "best"), ("router_init", "cold"), ("warm_bias", math.inf)],
)  # fmt: skip
def test_convert_options_are_checked(field: str, value: Any) -> None:
    with pytest.raises(LTEConfigError, match=field):
        ConvertConfig(**{field: value})


def test_lambda_ramp_and_rates() -> None:
    ramp = StageConfig(steps=100, lam=0.5)
    assert [round(ramp.lambda_at(s), 3) for s in (0, 50, 65, 80, 99)] == [0, 0, 0.25, 0.5, 0.5]
    assert StageConfig(steps=100, lam=0.5, lam_schedule="constant").lambda_at(0) == 0.5
    rates = [ramp.rate_at(s) for s in range(100)]
    assert max(rates) == 1.0
    assert rates[0] == pytest.approx(1 / 6)
    assert 0.0 < rates[-1] < 0.02
    assert threshold_logit(0.5) == 0.0


def test_unknown_moe_and_quantised_models_are_refused() -> None:
    class Named(nn.Module):
        def __init__(self, **fields: Any) -> None:
            super().__init__()
            self.config = type("Config", (), {"hidden_act": "silu", **fields})()

    for fields, match in (
        ({"model_type": "mamba"}, "model_type"),
        ({"model_type": "mixtral"}, "dense model"),
        ({"model_type": "qwen2_moe", "num_experts": 8}, "dense model"),
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, "floating-point"),
        ({"model_type": "llama", "hidden_act": "mish"}, "activation"),
    ):
        with pytest.raises(LTEConfigError, match=match):
            find_ffns(Named(**fields))
    model = tiny()
    model.model.layers[0].mlp.up_proj = nn.Identity()  # type: ignore[union-attr, index]
    with pytest.raises(LTEConfigError, match="plain floating-point"):
        find_ffns(model)
    broken = tiny()
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[0, 0] = math.inf  # type: ignore[union-attr, index, operator]
    with pytest.raises(LTEDataError, match="infinity"):
        find_ffns(broken)


def test_text_splits_by_document_and_refuses_too_little(tmp_path: Any) -> None:
    for index in range(30):
        (tmp_path / f"{index}.txt").write_text(f"document {index} " * 10)
    found = corpus("folder", tmp_path)
    assert found.held_out
    assert not set(found.train) & set(found.held_out)
    assert corpus("folder", tmp_path) == found
    blocks = TokenBlocks.encode(found.train, to_bytes, 16)
    seen = np.concatenate([blocks.rows(s, 4, 1) for s in range(len(blocks) // 4)])
    assert len(set(seen.tolist())) == len(seen)
    whole = blocks.batch(3, 4, 1).labels
    parts = [blocks.batch(3, 4, 1, rank, 2).labels for rank in (0, 1)]
    assert sorted(map(tuple, whole.tolist())) == sorted(map(tuple, torch.cat(parts).tolist()))
    with pytest.raises(LTEDataError, match="less than one block"):
        TokenBlocks(np.zeros(3), 16)
    with pytest.raises(LTEDataError, match="less than a batch"):
        TokenBlocks(np.zeros(32), 16).rows(0, 3, 0)
    with pytest.raises(LTEConfigError, match="corpus"):
        corpus("wikipedia")
    with pytest.raises(LTEDataError, match="no such folder"):
        corpus("folder", tmp_path / "absent")
