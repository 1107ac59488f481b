"""FSDP2: two workers that share weights and optimiser states train as one, and resume."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from safetensors.torch import load_file

from raysys.training.lte.config import ConvertConfig, StageConfig
from raysys.training.lte.conversion import convert
from raysys.training.lte.program import ProgramConfig, TextConfig, train


def work(rank: int, config: ProgramConfig, folder: Path) -> None:
    """One of two workers: the whole stage, then once more from its first state."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    states: list[bytes | None] = []
    found: list[dict[str, Any]] = []
    options: dict[str, Any] = {"rank": rank, "world": 2, "reduce": dist.all_reduce}
    found.append(train(config, lambda _, state: states.append(state), **options))
    shared: list[Any] = [states[0]]
    dist.broadcast_object_list(shared, src=0)
    found.append(train(config, lambda *_: None, saved=shared[0], **options))
    if rank == 0:
        torch.save([figures["nll"] for figures in found], folder / "found.pt")
    dist.destroy_process_group()


def test_two_workers_that_share_the_weights_train_as_one(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaConfig(vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                        num_attention_heads=2, tie_word_embeddings=True)  # fmt: skip
    LlamaForCausalLM(model).save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "lte", ConvertConfig(expert_size=8))
    for index in range(20):
        (tmp_path / f"{index}.txt").write_text(f"the {index} quick brown foxes " * 12)
    text = TextConfig(corpus="folder", folder=str(tmp_path), tokens="bytes", seq_len=16, held_out=4)
    stage = StageConfig(steps=4, batch=4, target_sparsity=0.5)
    config = ProgramConfig(model=str(tmp_path / "lte"), out=str(tmp_path / "alone"), text=text,
                           stage=stage, checkpoint_every=2)  # fmt: skip
    expected = train(config, lambda *_: None)
    sharded = dataclasses.replace(config, shard=True, out=str(tmp_path / "sharded"))
    processes.spawn(work, (sharded, tmp_path), 2)
    for nll in torch.load(tmp_path / "found.pt"):
        assert abs(nll - expected["nll"]) < 1e-4
    alone, both = (
        load_file(tmp_path / name / "model.safetensors") for name in ("alone", "sharded")
    )
    assert both.keys() == alone.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(both[name], tensor, rtol=0, atol=1e-4)
