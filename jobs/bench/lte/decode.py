"""Claims about whole models: decoding speed, and the same tokens from vLLM as from Hugging Face."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actors.lte.offline import OfflineAnswer, OfflineRequest, generate
from jobs.bench.lte import models
from raysys.bench import Baseline, Claim, Profile
from raysys.ops import lte_ops
from raysys.training.lte import checkpoint as checkpoints
from raysys.training.lte import flops
from raysys.training.lte.decoding import greedy, paired_speeds
from raysys.training.lte.inference import to_kernels
from raysys.training.lte.shapes import shape_of

PROMPT_TOKENS = 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def decode_speedup(profile: Profile) -> Claim:
    """Tokens per second of Transformers' model, LTE against dense, batch 1, one thread.

    Greedy, with the KV cache, both models in turns token by token.

    The ceiling is Amdahl's with the FFNs' share of the weights that a token reads.
    """
    before = models.single_thread()
    rows = []
    try:
        for dtype, sparsity in profile.pick(
            [("float32", 0.5), ("bfloat16", 0.5)],
            [(d, s) for d in DTYPES for s in (0.5, 0.8)],
        ):
            rows.append(_hugging_face(dtype, sparsity, profile.pick(24, 48), profile.pick(3, 5)))
    finally:
        torch.set_num_threads(before)
    return _speed_claim("decode_speedup", rows)


def decode_speedup_vllm(profile: Profile) -> Claim:
    """The same through vLLM: one sequence, one engine each for the dense and the LTE model.

    CPU time of the engine's process, which waits without spinning.
    """
    rows = []
    for sparsity in profile.pick((0.5,), (0.5, 0.8)):
        request = {
            "prompts": models.prompts(1, PROMPT_TOKENS),
            "tokens": 48,
            "repeats": profile.pick(3, 7),
        }
        dense = generate(OfflineRequest(folder=str(models.dense_model()), **request))
        sparse = generate(OfflineRequest(folder=str(models.fitted_model(sparsity)), **request))
        rows.append(_vllm_row(dense, sparse))
    return _speed_claim("decode_speedup_vllm", rows)


def vllm_tokens_equal(profile: Profile) -> Claim:
    """Share of greedy tokens that vLLM and the Hugging Face reference agree on, prompt by
    prompt.
    """
    folder = models.fitted_model(0.5)
    count, tokens = profile.pick(4, 8), profile.pick(24, 48)
    prompts = models.prompts(count, PROMPT_TOKENS)
    answer = generate(OfflineRequest(folder=str(folder), prompts=prompts, tokens=tokens, repeats=1))
    model = _kernel_model(folder, torch.float32)
    expected = [greedy(model, prompt, tokens) for prompt in prompts]
    same = [
        sum(a == b for a, b in zip(mine, theirs)) for mine, theirs in zip(answer.tokens, expected)
    ]
    return Claim(
        name="vllm_tokens_equal",
        value=sum(same) / (count * tokens),
        unit="share of tokens",
        better="higher",
        samples={"equal": same, "of": tokens, "density": answer.density, "paths": answer.paths},
    )


def _hugging_face(dtype: str, sparsity: float, tokens: int, repeats: int) -> dict[str, Any]:
    folder = models.fitted_model(sparsity)
    dense = checkpoints.load_dense(models.dense_model(), DTYPES[dtype])
    sparse = _kernel_model(folder, DTYPES[dtype])
    (prompt,) = models.prompts(1, PROMPT_TOKENS)
    for model in (dense, sparse):
        greedy(model, prompt, 4)
    lte_ops.PATHS.active = lte_ops.PATHS.possible = 0
    return {
        "dtype": dtype,
        **paired_speeds(dense, sparse, prompt, tokens, repeats),
        **_ceiling(folder, 1.0 - lte_ops.PATHS.density),
    }


def _vllm_row(dense: OfflineAnswer, sparse: OfflineAnswer) -> dict[str, Any]:
    speeds = statistics.median(dense.tokens_per_s), statistics.median(sparse.tokens_per_s)
    return {
        "dtype": "float32",
        "dense_tokens_per_s": speeds[0],
        "tokens_per_s": speeds[1],
        "speedup": speeds[1] / speeds[0],
        "dense_runs": dense.tokens_per_s,
        "runs": sparse.tokens_per_s,
        "dense_wall_s": dense.wall_s,
        "wall_s": sparse.wall_s,
        "paths": sparse.paths,
        **_ceiling(models.dense_model(), 1.0 - sparse.density),
    }


def _ceiling(folder: Path, sparsity: float) -> dict[str, float]:
    share = flops.ffn_read_share(shape_of(checkpoints.read_config(folder)))
    return {"sparsity": sparsity, "ceiling": flops.amdahl(share, sparsity), "ffn_share": share}


def _speed_claim(name: str, rows: list[dict[str, Any]]) -> Claim:
    for row in rows:
        row["of_ceiling"] = row["speedup"] / row["ceiling"]
    worst = min(rows, key=lambda row: row["of_ceiling"])
    return Claim(
        name=name,
        value=worst["of_ceiling"],
        unit="of Amdahl's ceiling at the achieved sparsity, worst case",
        better="higher",
        baseline=Baseline(name="dense, tokens/s", value=worst["dense_tokens_per_s"]),
        ratio=worst["speedup"],
        samples=rows,
    )


def _kernel_model(folder: Path, dtype: torch.dtype) -> nn.Module:
    checkpoint = checkpoints.load(folder)
    to_kernels(checkpoint, dtype)
    return checkpoint.sparse.model.eval()
