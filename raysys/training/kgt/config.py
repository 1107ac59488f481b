"""Options of knowledge-guided layer freezing, with the paper's defaults (EuroSys 2023, table 1).

Zero means "automatic" for the window and the interval; :func:`resolve` fills them from the length
of the run (section 6.5 of the paper for the interval; the short-run window is ours).
"""

from __future__ import annotations

import dataclasses

from raysys.config import check, check_choice, check_range
from raysys.errors import ConfigError

UNFREEZE_POLICIES = ("tenfold", "settled", "cycle_restart", "every_k_epochs", "never")
REFERENCES = ("auto", "fx_int8", "dynamic_int8", "bf16", "fp32")
SCOPES = ("frontmost", "all")
CACHE_DTYPES = ("fp16", "bf16", "fp32")
SHORT_RUN_STEPS = 5000
MIN_INTERVAL = 5
_WINDOWS_PER_PHASE = 5


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """Activation cache of the frozen prefix.

    Args:
        directory: where the memory-mapped files go; empty turns the cache off.
        budget_bytes: most bytes on disk; a fixed random subset of ids is cached beyond it. 0: all.
        dtype: stored precision. Rows are rounded to it whether they come from the cache or not, so
            a hit and a miss give the same value.
        prefetch_batches: batches read ahead in sampler order by a thread; 0 reads on demand.
        write_queue: most batches waiting to be written; 0 writes at once.
        pays_below: use the cache only if reading takes less than this share of the prefix forward.
    """

    directory: str = ""
    budget_bytes: int = 0
    dtype: str = "fp16"
    prefetch_batches: int = 0
    write_queue: int = 0
    pays_below: float = 0.8

    def __post_init__(self) -> None:
        check_choice(self, "dtype", CACHE_DTYPES)
        check_range(self, "budget_bytes", 0)
        check_range(self, "prefetch_batches", 0)
        check_range(self, "write_queue", 0)
        check_range(self, "pays_below", 0, low_open=True)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class KGTConfig:
    """Options of the method.

    Args:
        window: W, the smoothing window, the stale count and the reference's period, in readings.
        coef: threshold = coef * the largest of a module's first three absolute slopes.
        every: n, optimizer steps between readings.
        bootstrap_rate: leave bootstrapping below this relative loss change between windows.
        min_bootstrap_share: share of the run that is bootstrapping at least.
        bootstrap_window: steps per loss window; 0 takes the reading interval.
        min_epochs: passes over the data before the first freeze, for training from scratch: until
            then a flat curve means a high learning rate, not features that are done. 0 (paper)
            leaves it to bootstrapping. Epochs are those of ``start_epoch``.
        unfreeze: policy of :mod:`raysys.training.kgt.unfreeze`.
        unfreeze_factor: the rate ratio that releases.
        unfreeze_epochs: k of ``every_k_epochs``.
        keep_thresholds: modules keep their thresholds when the rate has dropped, instead of
            learning new ones.
        settled_below: ``settled`` keeps a module frozen if its plasticity at the freeze was below
            this share of its first smoothed plasticity.
        reference: precision of the reference model.
        scope: ``frontmost`` evaluates one module (paper); ``all`` every unfrozen one at once, so
            that several can freeze together.
        modules: M, most layer modules that grouping aims at.
        pattern: regular expression over module names that replaces block discovery.
        gram_rows: most rows of a batch whose Gram matrix is compared.
        rate_normalised: divide plasticity by the relative learning rate, so that a decaying rate
            alone does not look like convergence (for cosine schedules).
        eval_mode: measure the training model in eval mode by an extra forward of the prefix.
        expected_drops: rate drops that the automatic interval plans for.
        min_saving: skip a freeze that is predicted to save less than this share of the remaining
            run (0 freezes always).
        max_cpu_load: skip a reading while the machine's load per core is above it; 0 never skips.
    """

    window: int = 0
    coef: float = 0.2
    every: int = 0
    bootstrap_rate: float = 0.10
    min_bootstrap_share: float = 0.05
    bootstrap_window: int = 0
    min_epochs: int = 0
    unfreeze: str = "tenfold"
    unfreeze_factor: float = 0.1
    unfreeze_epochs: int = 10
    keep_thresholds: bool = False
    settled_below: float = 0.3
    reference: str = "auto"
    scope: str = "frontmost"
    modules: int = 8
    pattern: str = ""
    gram_rows: int = 64
    rate_normalised: bool = False
    eval_mode: bool = False
    expected_drops: int = 2
    min_saving: float = 0.0
    max_cpu_load: float = 0.0
    cache: CacheConfig = dataclasses.field(default_factory=CacheConfig)

    def __post_init__(self) -> None:
        check(self, "window", self.window == 0 or self.window >= 2, "0 (automatic) or at least 2")
        check(self, "every", self.every >= 0, "0 (automatic) or at least 1")
        check_range(self, "coef", 0, low_open=True)
        check_range(self, "bootstrap_rate", 0, low_open=True)
        check_range(self, "min_bootstrap_share", 0, 1, high_open=True)
        check_range(self, "bootstrap_window", 0)
        check_range(self, "min_epochs", 0)
        check_choice(self, "unfreeze", UNFREEZE_POLICIES)
        check_range(self, "unfreeze_factor", 0, 1, low_open=True, high_open=True)
        check_range(self, "unfreeze_epochs", 1)
        check_range(self, "settled_below", 0)
        check_choice(self, "reference", REFERENCES)
        check_choice(self, "scope", SCOPES)
        check_range(self, "modules", 2)
        check_range(self, "gram_rows", 2)
        check_range(self, "expected_drops", 0)
        check_range(self, "min_saving", 0, 1, high_open=True)
        check_range(self, "max_cpu_load", 0)


def automatic_interval(total_steps: int, window: int, modules: int, drops: int) -> int:
    """n = steps / (2 W) / modules / (1 + 0.5 + 0.25 + ...), one term per drop and the start."""
    terms = sum(0.5**index for index in range(drops + 1))
    return max(MIN_INTERVAL, round(total_steps / (2 * window) / modules / terms))


def interval_for_all(total_steps: int, window: int, drops: int) -> int:
    """n where every module is read at once: five windows of readings in each phase of the rate.

    One pass serves all modules, so their number does not matter. Ours; on a run of 736 steps twice
    as long an interval left the modules training until shortly before the first drop.
    """
    return max(MIN_INTERVAL, round(total_steps / (_WINDOWS_PER_PHASE * window * (drops + 1))))


def resolve(config: KGTConfig, total_steps: int, modules: int) -> KGTConfig:
    """Fill the automatic window and interval for a run of ``total_steps`` optimizer steps.

    Raises:
        ConfigError: the run has no steps.
    """
    if total_steps < 1:
        raise ConfigError("total_steps", total_steps, "at least 1")
    window = config.window or (10 if total_steps >= SHORT_RUN_STEPS else 5)
    if config.scope == "frontmost":
        automatic = automatic_interval(total_steps, window, max(1, modules), config.expected_drops)
    else:
        automatic = interval_for_all(total_steps, window, config.expected_drops)
    automatic = max(1, min(automatic, total_steps // (4 * window)))
    every = config.every or automatic
    return dataclasses.replace(
        config, window=window, every=every, bootstrap_window=config.bootstrap_window or every
    )
