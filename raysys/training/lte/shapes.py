"""Sizes of a model for the accounting of FLOPs, read from its ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raysys.training.lte.errors import LTEConfigError
from raysys.training.lte.flops import Shape


def shape_of(config: Mapping[str, Any]) -> Shape:
    """Shape of a model.

    Raises:
        LTEConfigError: a size is missing.
    """
    try:
        hidden = int(config.get("hidden_size") or config["n_embd"])
        heads = int(config.get("num_attention_heads") or config["n_head"])
        neurons = config.get("intermediate_size") or config.get("ffn_dim") or config.get("n_inner")
        gated = config.get("model_type") not in ("gpt2", "bert", "roberta", "opt")
        return Shape(
            layers=int(config.get("num_hidden_layers") or config["n_layer"]),
            hidden=hidden,
            neurons=int(neurons or 4 * hidden),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_size=int(config.get("head_dim") or hidden // heads),
            vocabulary=int(config["vocab_size"]),
            matrices=3 if gated else 2,
            expert_size=int((config.get("lte") or {}).get("expert_size", 32)),
        )
    except KeyError as error:
        raise LTEConfigError("config.json", str(error), "the sizes of a transformer") from None
