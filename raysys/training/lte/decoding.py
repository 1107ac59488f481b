"""Greedy decoding with a Hugging Face model, and how long a token takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn


class Decoder:
    """Greedy decoding of one sequence with the model's own KV cache.

    A plain loop over the model's forward: ``generate()`` gives the same tokens, and its
    bookkeeping takes milliseconds a token on a CPU.

    Args:
        model: a causal language model of Transformers, in evaluation mode.
        prompt: token ids, one or more; read by the first :meth:`step`.
    """

    def __init__(self, model: nn.Module, prompt: Sequence[int]) -> None:
        self.model = model
        self._next = torch.tensor([list(prompt)])
        self._cache = None

    @torch.inference_mode()
    def step(self) -> int:
        """The next token's id."""
        out = self.model(
            self._next, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )  # fmt: skip
        self._cache = out.past_key_values
        self._next = out.logits[:, -1].argmax(-1, keepdim=True)
        return int(self._next)


def greedy(model: nn.Module, prompt: Sequence[int], tokens: int) -> list[int]:
    """Exactly ``tokens`` greedy tokens after a prompt, batch 1."""
    decoder = Decoder(model, prompt)
    return [decoder.step() for _ in range(tokens)]


def paired_speeds(
    dense: nn.Module,
    sparse: nn.Module,
    prompt: Sequence[int],
    tokens: int,
    repeats: int,
    clock: Callable[[], float] = time.thread_time,
) -> dict[str, float]:
    """Tokens per second of both models, which take turns token by token; prompts are not counted.

    Args:
        tokens: counted tokens of a repeat.
        clock: seconds; by default CPU time of the calling thread, right for one torch thread.

    Returns:
        ``dense_tokens_per_s`` and ``tokens_per_s`` from the median time of a token, and
        ``speedup``, the median over all tokens of the ratio of neighbours.
    """
    times = []
    for _ in range(repeats):
        decoders = Decoder(dense, prompt), Decoder(sparse, prompt)
        for decoder in decoders:
            decoder.step()
        times += [tuple(_seconds(d, clock) for d in decoders) for _ in range(tokens)]
    return {
        "dense_tokens_per_s": 1 / statistics.median(d for d, _ in times),
        "tokens_per_s": 1 / statistics.median(s for _, s in times),
        "speedup": statistics.median(d / s for d, s in times),
    }


def _seconds(decoder: Decoder, clock: Callable[[], float]) -> float:
    started = clock()
    decoder.step()
    return clock() - started
