"""Sizes and budget of the contest on a small language model (see ``contest.py``)."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import nn

from raysys.training.lte import flops
from raysys.training.lte.config import Grouping, LambdaSchedule
from raysys.training.lte.shapes import shape_of
from raysys.training.lte.text import BYTE_VOCABULARY


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ContestConfig:
    """The small model and the common budget.

    Args:
        hidden, neurons, layers, heads: of a LLaMA over bytes.
        expert_size: neurons per expert.
        length, batch: bytes per block, blocks per step.
        base_steps, base_lr: of the dense model from scratch.
        steps, lr: of every method afterwards; LTE's two stages share the steps.
        stage1: share of LTE's steps in stage 1.
        stage2_rate: factor on the rate in stage 2, whose short schedule would start with a jump.
        sparsity: FFN sparsity of every method.
        eta: where the target controller starts; lam, lam_schedule, router_init, grouping as LTE's.
        distil: share of the distillation loss, from the dense model tuned for ``steps``.
        held_out: blocks to evaluate on; 0 takes all.
    """

    hidden: int = 128
    neurons: int = 512
    layers: int = 4
    heads: int = 4
    expert_size: int = 16
    length: int = 128
    batch: int = 8
    base_steps: int = 400
    base_lr: float = 2e-3
    steps: int = 240
    lr: float = 5e-4
    stage1: float = 0.8
    stage2_rate: float = 0.1
    sparsity: float = 0.62
    eta: float = 0.03
    lam: float = 0.05
    lam_schedule: LambdaSchedule = "ramp"
    router_init: Literal["default", "warm", "fitted"] = "fitted"
    router_lr: float = 1e-2
    grouping: Grouping = "kmeans"
    distil: float = 0.0
    held_out: int = 96

    def model(self, seed: int, activation: str = "silu") -> nn.Module:
        """A fresh model."""
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(seed)
        model: nn.Module = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=BYTE_VOCABULARY,
                hidden_size=self.hidden,
                intermediate_size=self.neurons,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=self.heads,
                max_position_embeddings=max(512, self.length),
                hidden_act=activation,
                tie_word_embeddings=True,
            )
        )
        return model

    @property
    def shape(self) -> flops.Shape:
        return dataclasses.replace(
            shape_of(
                {
                    "hidden_size": self.hidden,
                    "intermediate_size": self.neurons,
                    "num_hidden_layers": self.layers,
                    "num_attention_heads": self.heads,
                    "vocab_size": BYTE_VOCABULARY,
                }
            ),
            expert_size=self.expert_size,
        )
