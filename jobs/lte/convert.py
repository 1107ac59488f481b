"""Convert a dense model folder to LTE, or back with ``undo=true``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from actors.lte.training import cluster_on_ray
from jobs.launcher import Job, JobContext, Summary
from raysys.config import check
from raysys.training.lte.config import ConvertConfig
from raysys.training.lte.conversion import cluster_all, convert, undo


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """What to convert.

    Args:
        model: folder in the Hugging Face layout; empty takes the packaged SmolLM2-135M-Instruct.
        out: folder of the result.
        undo: ``model`` is an LTE checkpoint; write its dense model.
        ray: cluster the layers as Ray tasks instead of one after the other.
    """

    model: str = ""
    out: str = "lte-model"
    undo: bool = False
    ray: bool = False
    options: ConvertConfig = dataclasses.field(default_factory=ConvertConfig)

    def __post_init__(self) -> None:
        check(self, "out", bool(self.out), "a folder")


def run(config: Config, context: JobContext) -> Summary:
    """Convert; the result is complete or not there."""
    source, out = source_folder(config.model), Path(config.out)
    if config.undo:
        undo(source, out)
        return Summary(lines=[f"dense model in {out}"])
    if config.ray:
        context.ray()
    found = convert(
        source, out, config.options, cluster=cluster_on_ray if config.ray else cluster_all
    )
    gates = found.sparse.gates
    context.run.write_json("result.json", {"out": str(out), "layers": len(gates)})
    size = f"{gates[0].ffn.neurons} neurons in {gates[0].experts} experts"
    return Summary(
        lines=[
            f"{len(gates)} FFNs of {size} each",
            f"LTE checkpoint (stage 0) in {out}; next: raysys lte train --set model={out}",
        ]
    )


def source_folder(given: str) -> Path:
    """The folder that was given, or the packaged model's.

    Raises:
        CapabilityError: none was given and the packaged model is not installed.
    """
    if given:
        return Path(given)
    from actors.serving import packaged_model

    return packaged_model.prepare()


JOB = Job(name="lte convert", config=Config, run=run)
