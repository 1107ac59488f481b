"""Configuration of the store: tables, budget, utility, cadence and optimizer.

Values that the paper (Luo et al., arXiv 2401.04408) does not state are our choice; docs/fiited.md
lists them. A budget is exactly one of bytes (everything included), chunk slots, or a pruning
ratio of a stated number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from raysys.config import check, check_choice, check_range
from raysys.errors import ConfigError
from raysys.machine import memory_bytes
from raysys.ops.fiited_abi import INITS, MAX_CHUNKS, OPTIMIZER_STATES, UTILITIES, WEIGHT_BYTES

MAX_DIM = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class TableSpec:
    """One embedding table: a categorical field, or several that share vectors.

    Args:
        name: unique name.
        dim: full width D in floats; a multiple of the store's chunk.
        rows: distinct rows expected; the reference of ``budget_ratio``, not a limit.
        weight: factor on the utility of the table's chunks (business priority).
        virtual_rows: 0 for the unlimited 64-bit space; V maps rows modulo V, with collisions.
        seed: seed of the table's hash; None derives one from the table's position.
    """

    name: str
    dim: int = 64
    rows: int = 1_000_000
    weight: float = 1.0
    virtual_rows: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        check(self, "name", bool(self.name), "a non-empty name")
        check_range(self, "dim", 4, MAX_DIM)
        check_range(self, "rows", 1)
        check_range(self, "weight", 0, low_open=True)
        check_range(self, "virtual_rows", 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class FiitedConfig:
    """How rows get their lengths, and how they are trained.

    Args:
        chunk: floats per chunk C.
        shape: "prefix" (a row keeps its first m chunks; class slabs) or "free" (any subset).
        budget_slots, budget_bytes, budget_ratio: exactly one is given. A ratio rho keeps
            ``1 - rho`` of ``sum(rows * dim)`` over the tables.
        scope: one threshold over all tables, or the budget shared out by expected rows.
        utility: "freq_grad" is the paper's signal; "saliency" estimates the loss change.
        frequency_power, exploration: exponent a of the use count; lambda of "saliency".
        gamma: decay of utilities per round, in (0, 1].
        cadence: "continuous" reviews 1/``interval`` of the rows after every step; "interval" all
            rows every ``interval`` steps, denser at the start; "manual" only on request.
        hysteresis, churn_cap, slack: bonus of alive chunks; exchanged share of the pool per
            round; share of the pool kept free.
        admit_after: sightings before a row gets memory once the pool is 80% full; 0 creates rows
            at their first lookup, at full width, while there is room.
        min_alive: rounds for which a grown chunk is safe.
        weights: number format of stored weights, "fp32" or "bf16"; gradients, sums and optimizer
            state are fp32 either way, and bf16 weights are rounded stochastically at each step.
        init, init_scale: "uniform" draws from +-init_scale/sqrt(D).
        optimizer, lr, eps, beta1, beta2, weight_decay, clip, acc0: the fused update; ``clip`` is
            the largest norm of a row's gradient, 0 for none.
        on_nonfinite: "skip" rejects the affected rows and counts them; "raise" rejects the step.
        page_bytes: size of pages of the pool and the directory; 0 chooses by the budget.
        poison: fill freed memory with NaN (for tests of memory safety).
    """

    chunk: int = 16
    shape: Literal["prefix", "free"] = "prefix"
    budget_slots: int | None = None
    budget_bytes: int | None = None
    budget_ratio: float | None = None
    scope: Literal["global", "table"] = "global"
    utility: str = "freq_grad"
    frequency_power: float = 1.0
    exploration: float = 0.2
    gamma: float = 0.9
    cadence: Literal["continuous", "interval", "manual"] = "continuous"
    interval: int = 100
    hysteresis: float = 0.1
    churn_cap: float = 0.05
    slack: float = 0.01
    admit_after: int = 2
    min_alive: int = 1
    weights: Literal["fp32", "bf16"] = "fp32"
    init: str = "uniform"
    init_scale: float = 1.0
    optimizer: str = "rowwise_adagrad"
    lr: float = 0.05
    eps: float = 1e-8
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    clip: float = 0.0
    acc0: float = 0.0
    on_nonfinite: Literal["skip", "raise"] = "skip"
    id_space: Literal["signed", "bits"] = "signed"
    free_policy: Literal["fullest", "lifo"] = "fullest"
    compact: bool = True
    sketch_cells: int = 0
    page_bytes: int = 0
    poison: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check(self, "chunk", self.chunk >= 4 and self.chunk % 4 == 0, "a multiple of 4")
        check_choice(self, "shape", ("prefix", "free"))
        check_choice(self, "scope", ("global", "table"))
        check_choice(self, "cadence", ("continuous", "interval", "manual"))
        check_choice(self, "utility", tuple(UTILITIES))
        check_choice(self, "optimizer", tuple(OPTIMIZER_STATES))
        check_choice(self, "init", tuple(INITS))
        check_choice(self, "weights", tuple(WEIGHT_BYTES))
        self._check_budget()
        check_range(self, "frequency_power", 0, 4)
        check_range(self, "exploration", 0, 1e6)
        check_range(self, "gamma", 0, 1, low_open=True)
        check_range(self, "interval", 1, 2**31)
        check_range(self, "hysteresis", 0, 100)
        check_range(self, "churn_cap", 0, 1, low_open=True)
        check_range(self, "slack", 0, 0.5)
        check_range(self, "admit_after", 0, 3)
        check_range(self, "min_alive", 0, 1000)
        for name in ("lr", "eps", "weight_decay", "clip", "acc0", "init_scale"):
            check_range(self, name, 0)
        for name in ("beta1", "beta2"):
            check_range(self, name, 0, 1, high_open=True)
        size = self.page_bytes
        valid = size == 0 or (4096 <= size <= 2**26 and size & (size - 1) == 0)
        check(self, "page_bytes", valid, "0 or a power of two from 4096 to 64 MiB")
        check_range(self, "sketch_cells", 0, 2**32)
        check_range(self, "seed", 0, 2**63)

    def _check_budget(self) -> None:
        given = [
            name
            for name in ("budget_slots", "budget_bytes", "budget_ratio")
            if getattr(self, name) is not None
        ]
        check(
            self,
            given[0] if given else "budget_slots",
            len(given) == 1,
            "exactly one of budget_slots, budget_bytes and budget_ratio",
        )
        if self.budget_slots is not None:
            check_range(self, "budget_slots", 1, 2**40)
        if self.budget_bytes is not None:
            check_range(self, "budget_bytes", 1, 2**50)
            limit = memory_limit_bytes()
            remedy = "Take a smaller budget or a larger machine"
            check(self, "budget_bytes", self.budget_bytes <= limit, f"at most {limit}", remedy)
        if self.budget_ratio is not None:
            check_range(self, "budget_ratio", 0, 1, high_open=True)

    @property
    def states(self) -> int:
        """Optimizer states per weight."""
        return OPTIMIZER_STATES[self.optimizer]

    @property
    def weight_bytes(self) -> int:
        """Bytes of a stored weight with its optimizer states."""
        return WEIGHT_BYTES[self.weights] + 4 * self.states


def memory_limit_bytes() -> int:
    """Memory that this process may use: the cgroup's limit or the machine's memory."""
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return memory_bytes()
    return min(memory_bytes(), int(text)) if text.isdigit() else memory_bytes()


def check_tables(config: FiitedConfig, tables: tuple[TableSpec, ...]) -> None:
    """Check tables against the store's chunk width and budget.

    Raises:
        ConfigError: no table, a repeated name, a width that chunks do not fill, more than 15
            chunks, or a budget below one chunk per table.
    """
    if not tables:
        raise ConfigError("tables", tables, "at least one table")
    names = [table.name for table in tables]
    if len(set(names)) < len(names):
        raise ConfigError("tables", names, "distinct names")
    for table in tables:
        if table.dim % config.chunk:
            raise ConfigError(f"{table.name}.dim", table.dim, f"a multiple of {config.chunk}")
        if table.dim // config.chunk > MAX_CHUNKS:
            remedy = "Take a wider chunk"
            raise ConfigError(f"{table.name}.dim", table.dim, "at most 15 chunks", remedy)
    slots = budget_slots(config, tables)
    if slots < len(tables):
        raise ConfigError("budget", slots, f"at least one chunk per table ({len(tables)})")
    needed = slots * config.chunk * config.weight_bytes
    if config.budget_bytes is None and needed > memory_limit_bytes():
        raise ConfigError("budget", needed, f"at most {memory_limit_bytes()} bytes of memory")


def budget_slots(config: FiitedConfig, tables: tuple[TableSpec, ...]) -> int:
    """Upper bound of alive chunks that the budget stands for."""
    if config.budget_slots is not None:
        return config.budget_slots
    if config.budget_bytes is not None:
        return config.budget_bytes // (config.chunk * config.weight_bytes)
    assert config.budget_ratio is not None
    full = sum(table.rows * (table.dim // config.chunk) for table in tables)
    return int(full * (1 - config.budget_ratio))
