"""Models of the speed claims: the packaged SmolLM2, and the same with fitted routers.

Fitted routers (``raysys/training/lte/fitting.py``) give real routing at a wanted sparsity
without training. They are for measuring speed; the claims on quality train.
"""

from __future__ import annotations

from pathlib import Path

import torch

from actors.serving import packaged_model
from raysys import machine
from raysys.training.lte import checkpoint as checkpoints
from raysys.training.lte.config import ConvertConfig
from raysys.training.lte.conversion import convert_model, with_training
from raysys.training.lte.fitting import fit_routers
from raysys.training.lte.text import TokenBlocks, corpus

SAMPLE_BLOCKS, BLOCK = 16, 128
EXPERT = 32


def dense_model() -> Path:
    """The packaged SmolLM2-135M-Instruct, prepared.

    Raises:
        CapabilityError: the package is not installed.
    """
    return packaged_model.prepare()


def fitted_model(sparsity: float) -> Path:
    """SmolLM2 with routers fitted to a sparsity; made once and kept in the cache folder."""
    folder = machine.cache_dir() / "lte" / f"smollm2-fitted-{round(100 * sparsity)}"
    if folder.is_dir():
        return folder
    source = dense_model()
    config = ConvertConfig(expert_size=EXPERT, router_init="warm")
    checkpoint = convert_model(checkpoints.load_dense(source), config, folder=source)
    blocks = TokenBlocks.encode(corpus("python").train[:40], tokeniser(source), BLOCK)
    fit_routers(checkpoint.sparse, blocks.all_batches(4, SAMPLE_BLOCKS), sparsity)
    checkpoints.save(with_training(checkpoint, stage=2), folder)
    return folder


def tokeniser(folder: Path):  # type: ignore[no-untyped-def]
    """The folder's tokeniser as a function from text to ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    return lambda text: tokenizer(text, verbose=False)["input_ids"]


def prompts(count: int, length: int) -> list[list[int]]:
    """Beginnings of held-out documents, as token ids."""
    encode = tokeniser(dense_model())
    texts = [text for text in corpus("python").held_out if len(text) > 20 * length]
    found = [encode(text)[:length] for text in texts]
    return [found[i % len(found)] for i in range(count)]


def single_thread() -> int:
    """Set torch to one thread; returns what it was."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    return before
