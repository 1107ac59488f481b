"""The run directory: manifest, metrics and events as Parquet, checkpoints, report."""

from raysys.runs.directory import RunDirectory
from raysys.runs.manifest import Manifest

__all__ = ["Manifest", "RunDirectory"]
