"""What `raysys embed train` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from raysys.config import check, check_choice, check_range
from raysys.training.fiited import FiitedConfig, TableSpec
from raysys.training.fiited.clicks import ClickLog, Format
from raysys.training.fiited.sharding.messages import Wire


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """A training run.

    Args:
        data: files or folders, separated by commas: Parquet, CSV with a header, Criteo TSV.
        format: "auto" goes by the suffix (.tsv is Criteo's).
        label, categorical, dense, text: columns; see ``raysys.training.fiited.clicks``.
        model: "dlrm" or "deepfm"; hidden: width of its dense layers.
        dim, chunk: full width of a row and of a chunk, in floats.
        rows: ids expected per field: the reference of ``prune``, not a limit.
        prune: share of the full-width weights to give up; budget_mb instead is a hard limit on
            real bytes, index included (local training only).
        ramp: share of the first epoch over which the pruning rises from 0.
        guard_tol: tolerated rise of log-loss when marginal chunks are hidden; 0 turns the quality
            guard off (local training only).
        utility, gamma, interval, optimizer, lr: of the embedding rows (docs/fiited.md).
        weights: "fp32", or "bf16" for half the bytes a chunk.
        cadence: "auto" is continuous locally and interval over shards.
        dense_lr: of the dense net (Adam).
        batch, epochs: samples per step over all workers; passes over the log.
        window: steps per line of the record. save_every: windows between checkpoints.
        shards: embedding servers; 0 keeps the tables in the training process.
        workers: data-parallel trainers (Ray Train); more than one needs shards.
        wire: number format between trainers and servers.
        threads: of the dense net, per trainer.
    """

    data: str = ""
    format: Format = "auto"
    label: str = "label"
    categorical: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    model: str = "dlrm"
    hidden: int = 64
    dim: int = 16
    chunk: int = 4
    rows: int = 100_000
    prune: float = 0.9
    budget_mb: float = 0.0
    ramp: float = 0.0
    guard_tol: float = 0.0
    utility: str = "freq_grad"
    gamma: float = 0.9
    interval: int = 20
    cadence: Literal["auto", "continuous", "interval"] = "auto"
    optimizer: str = "rowwise_adagrad"
    lr: float = 0.05
    weights: Literal["fp32", "bf16"] = "fp32"
    dense_lr: float = 0.005
    batch: int = 2048
    epochs: int = 1
    window: int = 20
    save_every: int = 5
    shards: int = 0
    workers: int = 1
    wire: Wire = "fp32"
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice(self, "model", ("dlrm", "deepfm"))
        check_choice(self, "cadence", ("auto", "continuous", "interval"))
        check_choice(self, "wire", ("fp32", "bf16"))
        for name in ("hidden", "rows", "batch", "epochs", "window", "save_every", "threads"):
            check_range(self, name, 1)
        check_range(self, "prune", 0, 1, high_open=True)
        for name in ("ramp", "guard_tol", "budget_mb", "dense_lr"):
            check_range(self, name, 0)
        check_range(self, "shards", 0, 256)
        check_range(self, "workers", 1, 256)
        alone = self.workers == 1 or self.shards > 0
        check(self, "workers", alone, "1 without shards", "Set shards=1 or more")
        local_only = self.ramp > 0 or self.guard_tol > 0 or self.budget_mb > 0
        remedy = "Set ramp, guard_tol and budget_mb to 0, or shards=0"
        check(self, "shards", not (self.shards and local_only), "0 with these options", remedy)
        moving = self.ramp > 0 or self.guard_tol > 0
        remedy = "A ramp and the guard set the budget in chunks"
        check(
            self, "budget_mb", not (moving and self.budget_mb > 0), "0 with ramp or guard", remedy
        )
        self.store_config()

    def log(self) -> ClickLog:
        """The click log.

        Raises:
            ConfigError: no data given. StorageError, DataError: it cannot be used.
        """
        check(self, "data", bool(self.data), "files of clicks", "Give --data clicks.parquet")
        return ClickLog(
            self.data.split(","), label=self.label, categorical=self.categorical,
            dense=self.dense, text=self.text, format_=self.format,
        )  # fmt: skip

    def store_config(self) -> FiitedConfig:
        """Configuration of the embedding store."""
        bytes_ = int(self.budget_mb * 1e6) or None
        cadence: Literal["continuous", "interval"] = "interval" if self.shards else "continuous"
        if self.cadence != "auto":
            cadence = self.cadence
        return FiitedConfig(
            chunk=self.chunk, budget_ratio=None if bytes_ else self.prune, budget_bytes=bytes_,
            utility=self.utility, gamma=self.gamma, cadence=cadence, interval=self.interval,
            optimizer=self.optimizer, lr=self.lr, weights=self.weights, id_space="bits",
            seed=self.seed,
        )  # fmt: skip

    def tables(self, fields: tuple[str, ...]) -> tuple[TableSpec, ...]:
        """One table per categorical column."""
        return tuple(TableSpec(name=name, dim=self.dim, rows=self.rows) for name in fields)
