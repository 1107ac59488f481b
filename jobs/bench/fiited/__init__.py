"""FIITED's claims: speed against public kernels, quality at a budget, memory as it really is.

    python -m jobs.bench fiited

``step_vs_fbgemm`` needs FBGEMM's CPU package: pip install --no-deps fbgemm-gpu-cpu==1.8.0
"""

from __future__ import annotations

import functools

from jobs.bench.fiited import memory, quality, shards, speed
from raysys.bench import ClaimFunction

CONFIG = {
    "speed": "8 tables x 500,000 rows (quick: 50,000) x 64 floats, batch 4096, Zipf 1.05, CPU time",
    "quality": "planted stream of 224,000 ids, 900 steps of 2048 (quick: a quarter), 16 floats",
    "pruned": speed.RATIO,
}

CLAIMS: dict[str, ClaimFunction] = {
    "step_vs_fbgemm": speed.step_vs_fbgemm,
    "step_vs_embeddingbag": speed.step_vs_embeddingbag,
    "indirection_tax": speed.indirection_tax,
    "bf16_step": speed.bf16_step,
    "lookup_vs_embeddingbag": speed.lookup_vs_embeddingbag,
    "adjust_4m_ms": speed.adjust_4m_ms,
    "step_p99": speed.step_p99,
    "fragmentation": memory.fragmentation,
    "mapped_vs_accounted": memory.mapped_vs_accounted,
    "checkpoint_mb_s": memory.checkpoint_mb_s,
    "wire_bytes_93": shards.wire_bytes_93,
    "two_shards_equal_one": shards.two_shards_equal_one,
    "scale": shards.scale,
    "auc_loss_75": functools.partial(quality.auc_loss, "auc_loss_75", 0.75),
    "auc_loss_90": functools.partial(quality.auc_loss, "auc_loss_90", 0.90),
    "bf16_auc_loss": quality.bf16_auc_loss,
    "chunks_vs_rows": quality.chunks_vs_rows,
    "bytes_saved_90": quality.bytes_saved_90,
    "post_drift_recovery": quality.post_drift_recovery,
    "importance_found": quality.importance_found,
    "movielens": quality.movielens,
}
