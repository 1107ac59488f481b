"""Selection methods that CCS is compared with, behind one interface: ``select(table, m, seed)``."""

from raysys.training.ccs.baselines.dynamic import InfoBatch
from raysys.training.ccs.baselines.geometric import Herding, KCenter, Moderate, Prototypes
from raysys.training.ccs.baselines.graph import D2Pruning
from raysys.training.ccs.baselines.method import Method, check_budget
from raysys.training.ccs.baselines.ranked import (
    CCS,
    CutRandom,
    EasiestFirst,
    HardestFirst,
    Random,
    StratifiedRandom,
)

__all__ = [
    "CCS",
    "CutRandom",
    "D2Pruning",
    "EasiestFirst",
    "HardestFirst",
    "Herding",
    "InfoBatch",
    "KCenter",
    "Method",
    "Moderate",
    "Prototypes",
    "Random",
    "StratifiedRandom",
    "check_budget",
]
