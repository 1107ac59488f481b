"""Who may enter, and with which weight: API keys, in-flight limits, Retry-After.

Decisions only; the HTTP side is ``ingress.py``. A limit per endpoint keeps the queue at a length
that still moves; a limit per tenant keeps one client from taking all of it.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from raysys.config import check, check_range
from raysys.serving.andes.spec import MAX_TENANT_LENGTH, MAX_WEIGHT

MIN_RETRY_S = 1
MAX_RETRY_S = 60
_RATE_MEMORY = 0.9  # weight of the past in the moving average of completions


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiKey:
    """One client's key; only its digest is configured.

    Args:
        tenant: name in metrics, and who is charged.
        sha256: hexadecimal SHA-256 of the key (``printf %s KEY | sha256sum``).
        weight: the tenant's weight in the planner; clients cannot raise it.
        max_inflight: most requests of this tenant at once.
    """

    tenant: str
    sha256: str
    weight: float = 1.0
    max_inflight: int = 1024

    def __post_init__(self) -> None:
        named = 0 < len(self.tenant) <= MAX_TENANT_LENGTH
        check(self, "tenant", named, f"a name of 1 to {MAX_TENANT_LENGTH} letters")
        digits = len(self.sha256) == 64 and all(c in "0123456789abcdef" for c in self.sha256)
        remedy = "printf %s KEY | sha256sum"
        check(self, "sha256", digits, "64 lower-case hexadecimal digits", remedy)
        check_range(self, "weight", 0.0, MAX_WEIGHT, low_open=True)
        check_range(self, "max_inflight", 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdmissionConfig:
    """Limits at the door.

    Args:
        max_inflight: most requests inside the endpoint; more are answered 429.
        keys: API keys; without any the endpoint is open.
    """

    max_inflight: int = 256
    keys: tuple[ApiKey, ...] = field(default=())

    def __post_init__(self) -> None:
        check_range(self, "max_inflight", 1)
        tenants = [key.tenant for key in self.keys]
        check(self, "keys", len(set(tenants)) == len(tenants), "one key per tenant")


def find_key(keys: Sequence[ApiKey], presented: str) -> ApiKey | None:
    """The key that was presented, or None; takes equally long whichever matches, or none."""
    digest = hashlib.sha256(presented.encode("utf-8", "surrogatepass")).hexdigest()
    found = None
    for key in keys:
        if hmac.compare_digest(key.sha256, digest):
            found = key
    return found


class AdmissionGate:
    """Counts what is inside; one per ingress process.

    Args:
        config: limits.
    """

    def __init__(self, config: AdmissionConfig) -> None:
        self.config = config
        self.inflight: Counter[str] = Counter()
        self.refused = 0
        self._seconds_per_request = 1.0
        self._left_at: float | None = None

    def most(self, limit: int | None = None) -> int:
        """Most places that one request can ever get, given the tenant's own limit."""
        return min(self.config.max_inflight, limit or self.config.max_inflight)

    def enter(self, tenant: str, now_s: float, limit: int | None = None, places: int = 1) -> int:
        """Let a request in, or tell how long to stay away.

        Args:
            tenant: who asks.
            now_s: monotonic seconds.
            limit: the tenant's own limit.
            places: how many places it takes, one for each answer.

        Returns:
            0 if it is in, else the seconds for ``Retry-After``.
        """
        total = self.inflight.total()
        own = self.inflight[tenant]
        over = max(
            total + places - self.config.max_inflight, own + places - (limit or own + places)
        )
        if over <= 0:
            self.inflight[tenant] += places
            return 0
        self.refused += 1
        pause = self._seconds_per_request
        if self._left_at is not None:  # nothing leaves: the estimate is at least this long
            pause = max(pause, now_s - self._left_at)
        return int(min(MAX_RETRY_S, max(MIN_RETRY_S, math.ceil(over * pause))))

    def leave(self, tenant: str, now_s: float, places: int = 1) -> None:
        """A request that was let in has ended."""
        self.inflight[tenant] -= places
        if self.inflight[tenant] <= 0:
            del self.inflight[tenant]
        if self._left_at is not None:
            span = max(0.0, now_s - self._left_at)
            memory = _RATE_MEMORY * self._seconds_per_request
            self._seconds_per_request = memory + (1.0 - _RATE_MEMORY) * span
        self._left_at = now_s
