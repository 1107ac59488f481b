"""Tell what an LTE checkpoint holds: stage, experts, thresholds, sparsity per layer, FLOPs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jobs.launcher import Job, JobContext, Summary
from raysys.config import check
from raysys.training.lte import checkpoint as checkpoints
from raysys.training.lte import flops
from raysys.training.lte.shapes import shape_of


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Which checkpoint.

    Args:
        model: LTE checkpoint.
        full: also load and check every tensor.
    """

    model: str = ""
    full: bool = True

    def __post_init__(self) -> None:
        check(self, "model", bool(self.model), "an LTE checkpoint")


def run(config: Config, context: JobContext) -> Summary:
    """Read the facts; with ``full`` every tensor is checked too."""
    folder = Path(config.model)
    info = checkpoints.read_info(folder)
    if info is None:
        text = f"{folder} is a dense model; convert it with raysys lte convert"
        return Summary(lines=[text], exit_code=1)
    shape = shape_of(checkpoints.read_config(folder))
    sparsity = float(info.sparsity.get("overall", 0.0))
    sparse, dense = flops.paper(shape, sparsity), flops.paper(shape, 0.0, routers=False)
    lines = [
        f"{info.base_architecture}, stage {info.stage}, experts of {info.expert_size} neurons, "
        f"threshold {info.threshold:g}, offsets {list(info.thresholds)}",
        f"measured FFN sparsity {sparsity:.1%}" if info.sparsity else "no measured sparsity yet",
        f"GiFLOPs per token {sparse:.4f}, dense {dense:.4f}",
        *[f"  layer {i}: {v:.1%} off" for i, v in enumerate(info.sparsity.get("per_layer", []))],
    ]
    if config.full:
        count = len(checkpoints.load(folder).sparse.gates)
        lines.append(f"all tensors are in order: {count} routers, permutations whole")
    context.run.write_json("result.json", dataclasses.asdict(info))
    return Summary(lines=lines)


JOB = Job(name="lte inspect", config=Config, run=run)
