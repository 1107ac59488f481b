"""Knowledge-guided training: freeze the converged front of a network while it trains.

Wang et al., "Egeria: Efficient DNN Training with Knowledge-Guided Layer Freezing", EuroSys 2023.
"""

from raysys.training.kgt.baselines import (
    GradientCriterion,
    LinearSchedule,
    NoFreezing,
    Replay,
    StaticFreezing,
)
from raysys.training.kgt.config import CacheConfig, KGTConfig
from raysys.training.kgt.controller import FreezeController
from raysys.training.kgt.decision import Control, Decision, Offer
from raysys.training.kgt.events import EventLog
from raysys.training.kgt.plan import ModulePlan, parse
from raysys.training.kgt.session import KGT, DataDescription

__all__ = [
    "KGT",
    "CacheConfig",
    "Control",
    "DataDescription",
    "Decision",
    "EventLog",
    "FreezeController",
    "GradientCriterion",
    "KGTConfig",
    "LinearSchedule",
    "ModulePlan",
    "NoFreezing",
    "Offer",
    "Replay",
    "StaticFreezing",
    "parse",
]
