"""Others' use of each core, from ``/proc/stat`` less our own threads, and CPU pressure."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from actors.swan.affinity import run_times
from actors.swan.sysfs import text
from raysys.federated.swan.interference import Demand

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
IDLE, IOWAIT, STEAL = 3, 4, 7


class PressureReader:
    """Differences between two looks; the first look yields no demand.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float], proc_root: Path = Path("/proc")) -> None:
        self._clock = clock
        self._proc = proc_root
        self._cores: dict[int, tuple[float, float]] = {}
        self._own: dict[int, tuple[float, int]] = {}
        self._stalled_us = 0.0
        self._at_s = clock()
        self.own_cores = 0.0
        self.busy_cores = 0.0
        self.look()

    def look(self) -> Demand:
        """Others' share per core since the last look, in [0, 1], and the pressure."""
        now_s = self._clock()
        cores, own, stalled_us = self._busy(), run_times(self._proc), self._stalled()
        passed_s = max(now_s - self._at_s, 1e-6)
        used: dict[int, float] = {}
        for thread, (seconds, core) in own.items():
            before = self._own.get(thread, (seconds, core))[0]
            used[core] = used.get(core, 0.0) + seconds - before
        shares, busy_s = {}, 0.0
        for core, (busy, total) in cores.items():
            before_busy, before_total = self._cores.get(core, (busy, total))
            span_s = max(total - before_total, passed_s)
            busy_s += busy - before_busy
            mine = used.get(core, 0.0)
            shares[core] = min(max(busy - before_busy - mine, 0.0) / span_s, 1.0)
        own_s = sum(used.values())
        self.own_cores, self.busy_cores = own_s / passed_s, busy_s / passed_s
        shares = _rescaled(shares, max(busy_s - own_s, 0.0) / passed_s)
        pressure = min(max(stalled_us - self._stalled_us, 0.0) * 1e-6 / passed_s, 1.0)
        self._cores, self._own, self._stalled_us, self._at_s = cores, own, stalled_us, now_s
        return Demand(shares=shares, pressure=pressure)

    def _busy(self) -> dict[int, tuple[float, float]]:
        """Busy and total seconds by core; time stolen by a hypervisor counts as neither."""
        found: dict[int, tuple[float, float]] = {}
        for line in (text(self._proc / "stat") or "").splitlines():
            name, _, rest = line.partition(" ")
            if not (name.startswith("cpu") and name[3:].isdigit()):
                continue
            ticks = [int(word) for word in rest.split()[:8] if word.isdigit()]
            if len(ticks) < 5:
                continue
            stolen = ticks[STEAL] if len(ticks) > STEAL else 0
            total = sum(ticks) - stolen
            busy = total - ticks[IDLE] - ticks[IOWAIT]
            found[int(name[3:])] = (busy / TICKS_PER_S, total / TICKS_PER_S)
        return found

    def _stalled(self) -> float:
        for line in (text(self._proc / "pressure/cpu") or "").splitlines():
            if line.startswith("some"):
                total = line.rpartition("total=")[2]
                return float(total) if total.isdigit() else 0.0
        return 0.0


def _rescaled(shares: dict[int, float], others: float) -> dict[int, float]:
    """Make the shares add up to what others used in all.

    Our threads move between cores within a look, and all their time is put down to the last one;
    the sum is exact, the split is not.
    """
    total = sum(shares.values())
    if total <= others or total == 0:
        return shares
    return {core: share * others / total for core, share in shares.items()}
