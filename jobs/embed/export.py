"""Export a trained run as a model for serving: packed rows of their own lengths and the dense net.

raysys embed export --run runs/embed-train-... --set out=model --set values=int8
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from jobs.embed.config import TrainConfig
from jobs.embed.train import DENSE, TABLES, to_bytes
from jobs.launcher import Job, JobContext, Summary
from raysys.config import check, check_choice, config_from_dict
from raysys.errors import StorageError
from raysys.ops.fiited_abi import BUCKETS
from raysys.runs import RunDirectory
from raysys.training.fiited import FiitedStore, checkpoint
from raysys.training.fiited.packed import FORMATS, PackConfig, export_packed


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """An export.

    Args:
        run: run directory of ``raysys embed train``. out: folder of the model.
        values: "fp32", "bf16" or "int8" (one scale per chunk).
    """

    run: str = ""
    out: str = ""
    values: str = "bf16"

    def __post_init__(self) -> None:
        check(self, "run", bool(self.run), "a run directory of `raysys embed train`")
        check(self, "out", bool(self.out), "a folder for the model")
        check_choice(self, "values", FORMATS)


def run(config: ExportConfig, context: JobContext) -> Summary:
    """Load the newest checkpoint of a run and pack it."""
    trained = RunDirectory.open(config.run)
    settings = config_from_dict(TrainConfig, trained.manifest.config)
    columns = trained.read_json("columns.json")
    fields = tuple(columns["categorical"])
    tables, state = _newest(Path(config.run), settings)
    store = FiitedStore(settings.store_config(), settings.tables(fields), engine="native")
    checkpoint.load_shards(store, tables, np.ones(BUCKETS, np.uint8))
    out = Path(config.out)
    manifest = export_packed(store, out / TABLES, PackConfig(values=config.values))
    (out / DENSE).write_bytes(to_bytes(state["model"]))
    facts = {
        "model": settings.model, "hidden": settings.hidden, "dim": settings.dim,
        "columns": columns, "format": "raysys-embed-model",
    }  # fmt: skip
    (out / "model.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    size = sum(file["bytes"] for file in manifest["files"].values())
    line = f"{manifest['rows']:,} rows, {size / 1e6:.2f} MB as {config.values}: {out}"
    context.run.write_json("result.json", {"rows": manifest["rows"], "bytes": size})
    return Summary(lines=[line])


def _newest(run: Path, settings: TrainConfig) -> tuple[list[Path], dict[str, object]]:
    if settings.shards:
        from actors.fiited.saves import complete, shard_folders

        saves = complete(run / "shards")
        if saves:
            return shard_folders(saves[-1]), torch.load(saves[-1] / DENSE, weights_only=True)
    elif (run / "latest").is_dir():
        latest = run / "latest"
        return [latest / TABLES], torch.load(latest / DENSE, weights_only=True)
    raise StorageError(str(run), "holds no checkpoint", "Let the training reach its first save")


JOB = Job(name="embed export", config=ExportConfig, run=run, flags=("run", "out"))
