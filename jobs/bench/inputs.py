"""Small inputs that several benchmarks of whole jobs start from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def write_clicks(path: Path, rows: int, ids: int) -> None:
    """Clicks whose label depends on two Zipf-distributed ids below ``ids`` and a dense feature."""
    rng = np.random.default_rng(0)
    user, item = np.minimum(rng.zipf(1.3, (2, rows)), ids)
    price = rng.normal(size=rows)
    logit = np.sin(user * 1.7) * 1.5 + np.cos(item * 2.3) * 1.5 + price
    label = (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype(np.int64)
    columns = {"label": label, "user": user, "item": [f"i{i}" for i in item], "price": price}
    pq.write_table(pa.table(columns), path)


def write_language_model(dense: Path, text: Path) -> None:
    """A language model over bytes with two tiny layers, and a folder of a few documents."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, tie_word_embeddings=True, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(dense)
    text.mkdir()
    for index in range(12):
        (text / f"{index}.txt").write_text(f"the {index} quick brown foxes " * 12)
