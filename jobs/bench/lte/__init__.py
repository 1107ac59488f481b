"""LTE: the kernel, whole models, quality at fewer FLOPs, against dense and the literature's
methods.

Every claim runs alone with ``--only``; the training claims write each row as soon as it is
known and go on from there (``RAYSYS_HOME`` holds the rows).
"""

from __future__ import annotations

from jobs.bench.lte import decode, kernels, quality, serving, task
from raysys.bench import ClaimFunction

CONFIG = {
    "expert_size": kernels.EXPERT,
    "ffn_sizes": [list(kernels.SMALL), list(kernels.LARGE)],
    "ffn_timing": "one thread, CPU time of the calling thread, interleaved, router included",
    "decoding": "SmolLM2-135M-Instruct with routers fitted to a sparsity, batch 1",
}

CLAIMS: dict[str, ClaimFunction] = {
    "flops_accounting": kernels.flops_accounting,
    "ffn_speedup": kernels.ffn_speedup,
    "ffn_speedup_batched": kernels.ffn_speedup_batched,
    "ffn_never_slower": kernels.ffn_never_slower,
    "decode_speedup": decode.decode_speedup,
    "decode_speedup_vllm": decode.decode_speedup_vllm,
    "vllm_tokens_equal": decode.vllm_tokens_equal,
    "quality_at_flops": quality.quality_at_flops,
    "quality_at_flops_middle": quality.quality_at_flops_middle,
    "target_sparsity_error": quality.target_sparsity_error,
    "small_task": task.small_task,
    "andes_with_lte": serving.andes_with_lte,
}
