"""Phones of a shared population: when they are online, what a task costs, what they owe.

What a step costs comes from Swan's SoC model (:mod:`raysys.federated.swan.fleet`); an energy loan
excludes a phone until the night's charging repays it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from raysys.federated.swan.fleet import QUORUM, FleetDevice

DAY_S = 86_400.0
NOISE_TASKS = 64  # tasks of a phone after which its noise repeats
FloatArray = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    """Seconds and joules of one task on one phone."""

    seconds: float
    joules: float


class Phones:
    """Availability, costs and loans of N phones; everything random is drawn here, once.

    Args:
        devices: the phones. online: share of a day in which a phone is plugged out, idle and
            connected, one interval a day. link_s: median seconds to move model and update;
            log-normal over phones, sigma 1.
    """

    def __init__(
        self, devices: Sequence[FleetDevice], online: float, link_s: float, seed: int
    ) -> None:
        rng = np.random.default_rng((seed, 43))
        count = len(devices)
        self.devices = devices
        self.link_s: FloatArray = link_s * np.exp(rng.standard_normal(count))
        self._online_s = online * DAY_S
        self._phase_s: FloatArray = rng.random(count) * DAY_S
        self._noise: FloatArray = np.exp(0.05 * rng.standard_normal((count, NOISE_TASKS)))
        self._jitter: FloatArray = rng.random(count)
        self._tasks = np.zeros(count, dtype=np.int64)
        self._allowance_j = np.array([device.allowance_j for device in devices])
        self._loan_j = np.zeros(count)
        self._day = 0
        self._told: dict[str, int] = {}
        self.excluded: set[tuple[int, int]] = set()

    def __len__(self) -> int:
        return len(self.devices)

    def left_s(self, phone: int, now_s: float) -> float:
        """Seconds that a phone stays online; 0 while it is offline."""
        return max(0.0, self._online_s - self._into(phone, now_s))

    def next_checkin_s(self, phone: int, now_s: float, every_s: float) -> float:
        """When a phone checks in next: after ``every_s``, or early in its next online interval."""
        due_s = now_s + every_s
        if self._into(phone, due_s) < self._online_s:
            return due_s
        start_s = due_s + DAY_S - self._into(phone, due_s)
        return float(start_s + self._jitter[phone] * every_s)

    def first_checkin_s(self, phone: int, every_s: float) -> float:
        """A phone's first check-in after time 0."""
        return self.next_checkin_s(phone, float(self._jitter[phone] - 1.0) * every_s, every_s)

    def owes(self, phone: int, now_s: float) -> bool:
        """Whether its loan keeps a phone out for the rest of the day."""
        self._repay(now_s)
        owing = bool(self._loan_j[phone] >= self._allowance_j[phone])
        if owing:
            self.excluded.add((self._day, phone))
        return owing

    def cost(self, phone: int, steps: int) -> Cost:
        """Cost of a task that starts now; a phone's first one explores, or verifies a profile."""
        device = self.devices[phone]
        step_s, step_j = self._choice(phone)
        noise = float(self._noise[phone, self._tasks[phone] % NOISE_TASKS])
        extra_s, extra_j = 0.0, 0.0
        if self._tasks[phone] == 0:
            told = self._told.get(device.phone.name, 0)
            extra_s, extra_j = device.explore if told < QUORUM else device.verify
            self._told[device.phone.name] = told + 1
        self._tasks[phone] += 1
        seconds = float(self.link_s[phone]) + steps * step_s * noise + extra_s
        return Cost(seconds, steps * step_j + extra_j)

    def spend(self, phone: int, joules: float, now_s: float) -> None:
        """Add to a phone's loan."""
        self._repay(now_s)
        self._loan_j[phone] += joules

    def _into(self, phone: int, now_s: float) -> float:
        """Seconds since the phone's latest online interval began."""
        return math.fmod(now_s + self._phase_s[phone] + DAY_S, DAY_S)

    def _choice(self, phone: int) -> tuple[float, float]:
        """Seconds and joules of a step; thriftier the more is owed, as Swan's fleet chooses."""
        steps = self.devices[phone].steps
        owed = min(float(self._loan_j[phone] / self._allowance_j[phone]), 1.0)
        price = owed * max(s for s, _ in steps) / max(j for _, j in steps)
        return min(steps, key=lambda step: step[0] + price * step[1])

    def _repay(self, now_s: float) -> None:
        day = int(now_s // DAY_S)
        if day != self._day:
            self._day = day
            self._loan_j[:] = 0.0
