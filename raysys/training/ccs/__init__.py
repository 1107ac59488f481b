"""Coverage-centric coreset selection (CCS, Zheng et al., ICLR 2023, arXiv 2210.15809).

Train once, score every example by its training dynamics, keep a fraction that covers the data.
``python -m jobs.coreset`` is the program; ``docs/ccs.md`` explains it.
"""

from raysys.training.ccs.accumulator import ScoreAccumulator, ScoringConfig
from raysys.training.ccs.auto_beta import AutoBetaConfig, choose_beta, plan_beta_trials
from raysys.training.ccs.coreset import (
    Coreset,
    CoresetDataset,
    CoresetSampler,
    WithIndex,
    save_coreset,
)
from raysys.training.ccs.coverage import Coverage, coverage
from raysys.training.ccs.dynamics import StatBatch
from raysys.training.ccs.recorder import DynamicsRecorder
from raysys.training.ccs.selection import (
    Selection,
    SelectionConfig,
    coreset_size,
    default_beta,
    run_selection,
    select_ccs,
)
from raysys.training.ccs.store import read_scores, write_scores
from raysys.training.ccs.table import ScoreTable, stable_ids

__all__ = [
    "AutoBetaConfig",
    "Coreset",
    "CoresetDataset",
    "CoresetSampler",
    "Coverage",
    "DynamicsRecorder",
    "ScoreAccumulator",
    "ScoreTable",
    "ScoringConfig",
    "Selection",
    "SelectionConfig",
    "StatBatch",
    "WithIndex",
    "choose_beta",
    "coreset_size",
    "coverage",
    "default_beta",
    "plan_beta_trials",
    "read_scores",
    "run_selection",
    "save_coreset",
    "select_ccs",
    "stable_ids",
    "write_scores",
]
