"""LTE's vLLM plugin: found by vLLM, and greedy tokens equal to the Hugging Face reference."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest
import torch

from actors.lte.offline import OfflineRequest, generate
from raysys.training.lte import checkpoint as checkpoints
from raysys.training.lte.config import ConvertConfig
from raysys.training.lte.conversion import convert
from raysys.training.lte.inference import to_kernels

PROMPTS = [[1, 5, 9, 33], [7, 8, 9, 10, 11]]


def model_folder(path: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        initializer_range=0.2, max_position_embeddings=512,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path / "dense")
    convert(path / "dense", path / "lte", ConvertConfig(expert_size=8))
    return path / "lte"


def test_the_entry_point_names_the_plugin() -> None:
    points = importlib.metadata.entry_points(group="vllm.general_plugins")
    (ours,) = [point for point in points if point.name == "raysys_lte"]
    assert ours.value == "raysys.training.lte.plugin:register"


@pytest.mark.engine
def test_vllm_gives_the_reference_tokens(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    folder = model_folder(tmp_path)
    request = OfflineRequest(folder=str(folder), prompts=PROMPTS, tokens=8, repeats=1)
    answer = generate(request)
    assert 0.0 < answer.density < 1.0
    found = checkpoints.load(folder)
    to_kernels(found, calibrated=False)
    for prompt, tokens in zip(PROMPTS, answer.tokens):
        ids = torch.tensor([prompt])
        expected = found.sparse.model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
        assert expected[0, len(prompt) :].tolist() == tokens
    entry = json.loads((folder / "config.json").read_text())
    assert entry["architectures"] == ["LTELlamaForCausalLM"]
