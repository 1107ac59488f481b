"""Greedy decoding with a Hugging Face model, and how long a token takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn


@torch.no_grad()
def greedy(model: nn.Module, prompt: Sequence[int], tokens: int) -> list[int]:
    """Exactly ``tokens`` greedy tokens after a prompt, batch 1, with a KV cache."""
    ids = torch.tensor([list(prompt)])
    out = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    return [int(token) for token in out[0, len(prompt) :]]


def seconds_per_token(
    model: nn.Module,
    prompt: Sequence[int],
    tokens: int,
    clock: Callable[[], float] = time.thread_time,
) -> float:
    """Seconds per token after the first; the prompt's pass is taken off.

    Args:
        tokens: two or more.
        clock: seconds; by default CPU time of the calling thread, right for one torch thread.
    """
    started = clock()
    greedy(model, prompt, 1)
    first = clock() - started
    started = clock()
    greedy(model, prompt, tokens)
    return (clock() - started - first) / (tokens - 1)


def paired_speeds(
    dense: nn.Module, sparse: nn.Module, prompt: Sequence[int], tokens: int, repeats: int
) -> dict[str, float]:
    """Median tokens per second of both models, taken in turns, and the median of their ratios.

    Returns:
        ``dense_tokens_per_s``, ``tokens_per_s`` and ``speedup``.
    """
    times = [
        (seconds_per_token(dense, prompt, tokens), seconds_per_token(sparse, prompt, tokens))
        for _ in range(repeats)
    ]
    return {
        "dense_tokens_per_s": statistics.median(1 / d for d, _ in times),
        "tokens_per_s": statistics.median(1 / s for _, s in times),
        "speedup": statistics.median(d / s for d, s in times),
    }
