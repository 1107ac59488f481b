"""Serve an LTE checkpoint over HTTP through vLLM; its threshold may follow the load.

The same endpoint as ``raysys serve``, with the same fields under ``serving``.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from actors.serving.config import ServingConfig
from jobs import serve
from jobs.launcher import Job, JobContext, Summary
from raysys.config import check
from raysys.training.lte import checkpoint as checkpoints
from raysys.training.lte.budget import LoadBudget
from raysys.training.lte.errors import LTECheckpointError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """What to serve.

    Args:
        model: LTE checkpoint of a LLaMA-family model.
        levels: ``(tokens in a step, threshold offset)``; noted in the checkpoint's ``config.json``.
            Empty keeps what is there; ``[[0, 0.0]]`` is a fixed threshold.
    """

    model: str = ""
    levels: tuple[tuple[int, float], ...] = ()
    serving: ServingConfig = dataclasses.field(default_factory=ServingConfig)

    def __post_init__(self) -> None:
        check(self, "model", bool(self.model), "an LTE checkpoint")
        if self.levels:
            LoadBudget(self.levels)


def run(config: Config, context: JobContext) -> Summary:
    """Check the checkpoint, note the levels, serve until interrupted."""
    folder = Path(config.model).absolute()
    if checkpoints.read_info(folder) is None:
        raise LTECheckpointError(str(folder), "is a dense model", "Use raysys serve for it")
    if config.levels:
        checkpoints.set_entry(folder, levels=[list(level) for level in config.levels])
    model = dataclasses.replace(config.serving.model, folder=str(folder), name=folder.name)
    return serve.run(dataclasses.replace(config.serving, model=model), context)


JOB = Job(name="lte serve", config=Config, run=run)
