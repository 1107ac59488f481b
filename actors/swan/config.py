"""How an engine treats the machine it runs on."""

from __future__ import annotations

from dataclasses import dataclass, field

from actors.swan.discovery import PROC, SYS
from raysys.config import check_range
from raysys.federated.swan.pilot import Policy


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How the engine treats this machine.

    Args:
        sample_s: time between looks at the owner's demand.
        checkpoint_s: time between checkpoints, for tasks that have a folder.
        min_step_s: shorter steps are measured several at a time.
        nice: nice value of the training's threads, on top of giving way; 0 leaves them alone.
        lock: file that keeps two engines of one host apart; empty for none.
        sys_root, proc_root: other roots, for a machine described by files.
    """

    policy: Policy = field(default_factory=Policy)
    sample_s: float = 0.25
    checkpoint_s: float = 60.0
    min_step_s: float = 0.02
    nice: int = 10
    lock: str = ""
    sys_root: str = str(SYS)
    proc_root: str = str(PROC)

    def __post_init__(self) -> None:
        check_range(self, "sample_s", 0, low_open=True)
        check_range(self, "checkpoint_s", 0, low_open=True)
        check_range(self, "min_step_s", 0)
        check_range(self, "nice", 0, 19)
