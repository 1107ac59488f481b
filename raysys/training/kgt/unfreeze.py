"""When the frozen modules train again, and which of them (paper, section 4.3; policies are ours).

Only observed learning rates are used, so any scheduler works, plateau schedulers included. Several
parameter groups count by their largest rate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

RELATIVE_TOLERANCE = 1e-9  # 0.1 * 0.1 is not 0.01 in floating point


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class UnfreezeState:
    """What a policy may look at.

    Args:
        step: optimizer steps done.
        rate: the current learning rate.
        rate_at_freeze: the rate when the frontmost module was frozen; None if nothing is.
        lowest_rate: the smallest rate since that freeze.
        epoch: epochs done.
        epoch_at_freeze: epochs done at that freeze.
        factor: the ratio that releases.
        every_epochs: k of ``every_k_epochs``.
    """

    step: int
    rate: float
    rate_at_freeze: float | None
    lowest_rate: float
    epoch: int
    epoch_at_freeze: int
    factor: float
    every_epochs: int


def tenfold(state: UnfreezeState) -> bool:
    """The paper's rule: the rate is at most a tenth of the one at the freeze.

    A freeze at rate 0 (warm-up not begun) never fires: there is no ratio.
    """
    if state.rate_at_freeze is None or state.rate_at_freeze <= 0:
        return False
    return state.rate <= state.factor * state.rate_at_freeze * (1 + RELATIVE_TOLERANCE)


def cycle_restart(state: UnfreezeState) -> bool:
    """Cyclic schedules: the rate has come back up to ten times its lowest since the freeze."""
    if state.rate_at_freeze is None or state.rate <= 0:
        return False
    return state.lowest_rate <= state.factor * state.rate * (1 + RELATIVE_TOLERANCE)


def every_k_epochs(state: UnfreezeState) -> bool:
    """Release k epochs after the freeze."""
    if state.rate_at_freeze is None:
        return False
    return state.epoch - state.epoch_at_freeze >= state.every_epochs


def never(state: UnfreezeState) -> bool:
    """Keep what is frozen."""
    del state
    return False


POLICIES: dict[str, Callable[[UnfreezeState], bool]] = {
    "tenfold": tenfold,
    # Fires like the paper's rule; the controller then keeps the modules that had settled.
    "settled": tenfold,
    "cycle_restart": cycle_restart,
    "every_k_epochs": every_k_epochs,
    "never": never,
}
