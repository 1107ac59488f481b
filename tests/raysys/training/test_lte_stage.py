"""LTE's stages and checkpoints: exact resume, splits over workers, conversion and every refusal."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from raysys.errors import StorageError
from raysys.training.lte import checkpoint as checkpoints
from raysys.training.lte.adapters import find_ffns
from raysys.training.lte.config import ConvertConfig, StageConfig
from raysys.training.lte.conversion import coactivations, convert, convert_model, undo
from raysys.training.lte.decoding import greedy
from raysys.training.lte.errors import LTECheckpointError, LTEConfigError, LTEDataError
from raysys.training.lte.evaluation import evaluate
from raysys.training.lte.gating import SparseModel
from raysys.training.lte.inference import set_threshold, to_kernels
from raysys.training.lte.program import ProgramConfig, TextConfig, train
from raysys.training.lte.stage import Stage
from raysys.training.lte.text import Batch, TokenBlocks

IDS = torch.arange(12).reshape(2, 6) + 5
TOKENS = (np.arange(4096) * 7 % 61).astype(np.int64)


def model_of(kind: str = "llama") -> nn.Module:
    import transformers as t

    torch.manual_seed(0)
    common: dict[str, Any] = {"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 2,
                              "num_attention_heads": 2, "intermediate_size": 32}  # fmt: skip
    makers: dict[str, Any] = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**common, tie_word_embeddings=True)),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(
                vocab_size=256,
                n_embd=16,
                n_layer=2,
                n_head=2,
                n_inner=32,
                bos_token_id=0,
                eos_token_id=0,
            )
        ),
        "roberta": lambda: t.RobertaForSequenceClassification(
            t.RobertaConfig(**common, max_position_embeddings=40)
        ),
        "bert": lambda: t.BertForSequenceClassification(
            t.BertConfig(**common, max_position_embeddings=40)
        ),
    }
    found: nn.Module = makers[kind]().eval()
    return found


def dense_folder(path: Path, kind: str = "llama") -> Path:
    model_of(kind).save_pretrained(path)  # type: ignore[operator]
    return path


def staged(options: StageConfig, **extra: Any) -> Stage:
    sparse = SparseModel(model_of(), ConvertConfig(expert_size=8))
    return Stage(sparse, TokenBlocks(TOKENS, 16), options, **extra)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "roberta", "bert"])
def test_conversion_keeps_the_function_and_can_be_undone(kind: str, tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense", kind)
    dense = checkpoints.load_dense(source)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    with torch.no_grad():
        expected = dense(input_ids=IDS).logits
    convert(source, tmp_path / "lte", ConvertConfig(expert_size=8))
    found = checkpoints.load(tmp_path / "lte")
    with torch.no_grad():
        torch.testing.assert_close(
            found.sparse.model(input_ids=IDS).logits, expected, rtol=0, atol=1e-4
        )
        found.sparse.set_mode("hard")
        hard = found.sparse.model(input_ids=IDS).logits
        layers = to_kernels(found, calibrated=False)
        torch.testing.assert_close(
            found.sparse.model(input_ids=IDS).logits, hard, rtol=1e-4, atol=1e-5
        )
        set_threshold(layers, 0.5, offset=-1e9)
        torch.testing.assert_close(
            found.sparse.model(input_ids=IDS).logits, expected, rtol=0, atol=1e-4
        )
    undo(tmp_path / "lte", tmp_path / "back")
    restored = checkpoints.load_dense(tmp_path / "back").state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in restored.items())
    with pytest.raises(LTEConfigError, match="already"):
        convert(tmp_path / "lte", tmp_path / "twice", ConvertConfig(expert_size=8))


def test_coactivation_grouping_needs_and_uses_activations() -> None:
    with pytest.raises(LTEConfigError, match="activations"):
        convert_model(model_of(), ConvertConfig(expert_size=8, grouping="coactivation"))
    model = model_of()
    features = coactivations(model, [{"input_ids": IDS}])
    assert features[0].shape == (32, 12)
    options = ConvertConfig(expert_size=8, grouping="coactivation")
    assert len(convert_model(model, options, features=features).permutations) == 2


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_greedy_tokens_are_those_of_generate_also_through_the_kernel(kind: str) -> None:
    model, prompt = model_of(kind), [5, 9, 14]
    expected = model.generate(  # type: ignore[operator]
        torch.tensor([prompt]),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0, 3:].tolist()
    assert greedy(model, prompt, 12) == expected
    checkpoint = convert_model(model, ConvertConfig(expert_size=8))
    checkpoint.info = dataclasses.replace(checkpoint.info, threshold=1e-9)  # all are on
    to_kernels(checkpoint, calibrated=False)
    assert greedy(checkpoint.sparse.model, prompt, 12) == expected


def damage(folder: Path, change: Any) -> None:
    path = folder / checkpoints.WEIGHTS
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


ROUTER, PERM = "model.layers.0.mlp.router.weight", "lte.perm.0"


def _not_finite(tensors: dict[str, Tensor]) -> None:
    tensors[ROUTER] = torch.full_like(tensors[ROUTER], float("nan"))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop(ROUTER), "missing"),
        (lambda t: t.update({ROUTER: t[ROUTER].T.contiguous()}), "shape"),
        (lambda t: t.update({PERM: torch.zeros_like(t[PERM])}), "not a permutation"),
        (lambda t: t.update({"model.layers.9.mlp.router.weight": t[ROUTER].clone()}), "no place"),
        (_not_finite, "NaN"),
    ],
)
def test_damaged_checkpoints_are_refused(change: Any, match: str, tmp_path: Path) -> None:
    folder = tmp_path / "lte"
    convert(dense_folder(tmp_path / "dense"), folder, ConvertConfig(expert_size=8))
    damage(folder, change)
    with pytest.raises(LTECheckpointError, match=match):
        checkpoints.load(folder)


def test_unknown_version_wrong_size_and_missing_folder(tmp_path: Path) -> None:
    folder = tmp_path / "lte"
    convert(dense_folder(tmp_path / "dense"), folder, ConvertConfig(expert_size=8))
    checkpoints.set_entry(folder, levels=[[0, 0.0]])
    checkpoints.set_entry(folder, expert_size=16)
    with pytest.raises(LTECheckpointError, match="shape"):
        checkpoints.load(folder)
    checkpoints.set_entry(folder, version=9)
    with pytest.raises(LTECheckpointError, match="version is 9"):
        checkpoints.load(folder)
    with pytest.raises(LTECheckpointError, match="dense"):
        checkpoints.load(tmp_path / "dense")
    with pytest.raises(StorageError, match="No such file"):
        checkpoints.load(tmp_path / "absent")
    (folder / "config.json").write_text("{")
    with pytest.raises(LTECheckpointError, match="not JSON"):
        checkpoints.read_info(folder)


def test_a_full_disk_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "lte"
    found = convert(dense_folder(tmp_path / "dense"), folder, ConvertConfig(expert_size=8))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(StorageError, match="No space left"):
        checkpoints.save(found, folder)
    checkpoints.load(folder)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("number", [1, 2])
def test_a_resumed_stage_equals_an_uninterrupted_one(number: int) -> None:
    options = StageConfig(stage=number, steps=8, batch=4, lr=1e-3, target_sparsity=0.5,
                          threshold_offsets=(0.0, 0.5))  # fmt: skip
    whole = staged(options)
    whole.run()
    first = staged(options)
    first.run(until=3)
    state = copy.deepcopy(first.state_dict())
    second = staged(options)
    second.load_state_dict(state)
    second.run()
    assert second.log == whole.log
    for mine, theirs in zip(second.sparse.model.parameters(), whole.sparse.model.parameters()):
        assert torch.equal(mine, theirs)


class KilledError(Exception):
    """Stands for a worker that dies."""


def test_gradients_do_not_depend_on_the_split_over_workers() -> None:
    options = StageConfig(stage=1, steps=1, batch=8, lr=1e-3, lam_schedule="constant", clip=0.0)
    alone = staged(options)
    alone.run()
    seen: list[list[Tensor]] = [[], []]
    for rank in (0, 1):  # first pass: record every value that a rank hands to the sum
        stage = staged(
            options, rank=rank, world=2, reduce=lambda v, r=rank: seen[r].append(v.clone())
        )
        stage._loss(stage.data.batch(0, 8, 0, rank, 2))
    counts = seen[0][0] + seen[1][0]
    gradients = []
    for rank in (0, 1):
        calls = iter([counts])

        def reduce(values: Tensor, calls: Any = calls) -> None:
            known = next(calls, None)
            if known is not None:
                values.copy_(known)

        stage = staged(options, rank=rank, world=2, reduce=reduce)
        stage.sparse.set_mode("soft")
        stage.sparse.model.train()
        loss, _ = stage._loss(stage.data.batch(0, 8, 0, rank, 2))
        loss.backward()  # type: ignore[no-untyped-call]
        gradients.append([p.grad for p in stage.sparse.model.parameters()])
    check = staged(options)
    check.sparse.set_mode("soft")
    check.sparse.model.train()
    loss, _ = check._loss(check.data.batch(0, 8, 0, 0, 1))
    loss.backward()  # type: ignore[no-untyped-call]
    for whole, one, two in zip(check.sparse.model.parameters(), *gradients):
        torch.testing.assert_close(one + two, whole.grad, rtol=1e-4, atol=1e-6)


def test_stage_two_leaves_routers_bit_identical_and_learns() -> None:
    stage = staged(StageConfig(stage=2, steps=30, batch=8, lr=3e-3))
    before = [router.weight.clone() for router in stage.sparse.routers]
    stage.run()
    assert all(torch.equal(a, r.weight) for a, r in zip(before, stage.sparse.routers))
    assert stage.log[-1]["loss"] < stage.log[0]["loss"]


def test_eta_raises_sparsity_and_separability_clears_the_threshold() -> None:
    def after(**changes: Any) -> dict[str, Any]:
        options = {"stage": 1, "steps": 40, "batch": 8, "lr": 1e-3, "lam": 0.0, "eta": 0.0}
        stage = staged(StageConfig(**{**options, **changes}))
        stage.run()
        return stage.log[-1]

    assert after(eta=5.0)["sparsity"] > after()["sparsity"] + 0.1
    near = after(lam=0.5, lam_schedule="constant")["near"]
    assert near < after()["near"]


@pytest.mark.parametrize("scope", ["all", "ffn_and_router", "lora+router"])
def test_scopes_train_what_they_say(scope: Any) -> None:
    stage = staged(StageConfig(stage=1, steps=2, batch=4, scope=scope, lr=1e-2))
    before = {n: p.clone() for n, p in stage.sparse.model.named_parameters()}
    stage.run()
    moved = {n for n, p in stage.sparse.model.named_parameters() if not torch.equal(p, before[n])}
    assert any("router" in name for name in moved)
    assert any("self_attn" in name for name in moved) == (scope != "ffn_and_router")
    if scope == "lora+router":
        assert all("router" in name or "low_rank" in name for name in moved)


def test_distillation_needs_a_teacher_and_moves_towards_it() -> None:
    with pytest.raises(LTEConfigError, match="teacher"):
        staged(StageConfig(distil=0.5))
    stage = staged(StageConfig(stage=1, steps=2, batch=4, distil=1.0), teacher=model_of())
    stage.run()
    assert stage.done


def test_bad_labels_padding_and_nan_are_named() -> None:
    class Fixed:
        def __init__(self, batch: Batch) -> None:
            self.kept = batch

        def batch(self, *_: int) -> Batch:
            return self.kept

    ids = torch.zeros(2, 8, dtype=torch.long)
    sparse = SparseModel(model_of(), ConvertConfig(expert_size=8))
    ignored = Fixed(Batch({"input_ids": ids}, torch.full_like(ids, -100)))
    with pytest.raises(LTEDataError, match="every label is ignored"):
        Stage(sparse, ignored, StageConfig(steps=1)).run()
    padding = Fixed(
        Batch(
            {"input_ids": ids}, torch.full_like(ids, -100), torch.zeros_like(ids, dtype=torch.bool)
        )
    )
    with pytest.raises(LTEDataError, match="every label is ignored"):
        Stage(sparse, padding, StageConfig(steps=1)).run()
    with torch.no_grad():
        sparse.model.model.norm.weight.fill_(float("nan"))  # type: ignore[union-attr, operator]
    good = Fixed(Batch({"input_ids": ids}, ids))
    with pytest.raises(LTEDataError, match=r"not finite at step 0.*none was saved"):
        Stage(sparse, good, StageConfig(steps=1)).run()
    with pytest.raises(LTEConfigError, match="batch"):
        staged(StageConfig(batch=1), world=2)
    with pytest.raises(LTEDataError, match="labels"):
        evaluate(sparse, [])


def program(tmp_path: Path, **changes: Any) -> ProgramConfig:
    texts = tmp_path / "texts"
    texts.mkdir(exist_ok=True)
    for index in range(20):
        (texts / f"{index}.txt").write_text(f"the {index} quick brown foxes " * 12)
    text = TextConfig(corpus="folder", folder=str(texts), tokens="bytes", seq_len=16, held_out=4)
    options = {"model": str(tmp_path / "lte"), "out": str(tmp_path / "out"), "text": text,
               "stage": StageConfig(stage=1, steps=6, batch=4), "checkpoint_every": 2}  # fmt: skip
    return ProgramConfig(**{**options, **changes})


def test_a_program_killed_in_either_stage_resumes_exactly(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense")
    convert(source, tmp_path / "lte", ConvertConfig(expert_size=8, router_init="warm"))
    config = program(tmp_path)
    with pytest.raises(LTECheckpointError, match="stage 1"):
        train(dataclasses.replace(config, stage=StageConfig(stage=2)), lambda *_: None)
    for number, model in ((1, "lte"), (2, "out1")):
        stage = StageConfig(stage=number, steps=6, batch=4, target_sparsity=0.5)
        config = program(tmp_path, model=str(tmp_path / model), out=str(tmp_path / f"out{number}"),
                         stage=stage, fit=number == 1)  # fmt: skip
        whole = train(config, lambda *_: None)

        states: list[bytes] = []

        def die_later(_: dict[str, Any], state: bytes | None, states: list[bytes] = states) -> None:
            assert state is not None
            states.append(state)
            if len(states) == 2:
                raise KilledError

        with pytest.raises(KilledError):
            train(config, die_later)
        again = train(config, lambda *_: None, saved=states[1])
        assert again == whole
        other = dataclasses.replace(config, stage=dataclasses.replace(stage, lr=1.0))
        with pytest.raises(LTEConfigError, match="as before: lr"):
            train(other, lambda *_: None, saved=states[1])
    info = checkpoints.load(tmp_path / "out2").info
    assert info.stage == 2
    assert json.loads((tmp_path / "out2" / "config.json").read_text())["lte"]["version"] == 1
    assert len(find_ffns(checkpoints.load(tmp_path / "out2").sparse.model)) == 2
    with pytest.raises(LTEDataError, match="damaged"):
        train(config, lambda *_: None, saved=b"no state")
