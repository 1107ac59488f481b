"""Lease tickets: proof that a device was granted its lease, which a third party can check.

The gateway that grants a lease signs what it is for; the device shows the ticket wherever it uses
the lease. Whoever holds the deployment's secret can check it without asking the gateway.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import struct
from dataclasses import astuple, dataclass

from raysys.errors import ConfigError, InfeasibleError

_EXPIRY = struct.Struct("<d")
_PURPOSE = b"raysys lease ticket"
TICKET_BYTES = _EXPIRY.size + hashlib.sha256().digest_size
LEEWAY_S = 10.0  # clocks of gateway and service may differ by so much
SECRET_BYTES = 32


@dataclass(frozen=True, slots=True)
class LeaseClaim:
    """What a ticket speaks for: one device, one lease of one gateway, one round of one job."""

    device: str
    gateway: str
    epoch: int
    counter: int
    job_id: str
    round: int


class LeaseSeal:
    """Signs and checks tickets of :data:`TICKET_BYTES` bytes: expiry, then HMAC-SHA256.

    Args:
        secret: of the deployment; the key for tickets is derived from it, so that nothing else
            that is signed with it can pass for a ticket.

    Raises:
        ConfigError: a secret below 32 bytes.
    """

    def __init__(self, secret: bytes) -> None:
        if len(secret) < SECRET_BYTES:
            raise ConfigError("secret", len(secret), f"at least {SECRET_BYTES} bytes")
        self._key = hmac.new(secret, _PURPOSE, hashlib.sha256).digest()

    def issue(self, claim: LeaseClaim, expires_s: float) -> bytes:
        """A ticket that is good until ``expires_s``, in wall-clock seconds."""
        expiry = _EXPIRY.pack(expires_s)
        return expiry + self._sign(claim, expiry)

    def check(self, claim: LeaseClaim, ticket: bytes, now_s: float) -> None:
        """Accept a genuine, living ticket for exactly this claim.

        Raises:
            ConfigError: none was shown, or it is forged, or of another device, lease or round.
            InfeasibleError: it is genuine and has expired.
        """
        if not ticket:
            raise ConfigError("lease.ticket", "(none)", "the ticket that came with the lease")
        expiry, signature = ticket[: _EXPIRY.size], ticket[_EXPIRY.size :]
        if len(ticket) != TICKET_BYTES or not hmac.compare_digest(
            signature, self._sign(claim, expiry)
        ):
            reason = "a ticket that was signed for this device, lease and round"
            raise ConfigError("lease.ticket", "(hidden)", reason)
        expires_s = _EXPIRY.unpack(expiry)[0]
        if not (math.isfinite(expires_s) and now_s <= expires_s + LEEWAY_S):
            raise InfeasibleError("this lease", "its ticket has expired", "Check in again")

    def _sign(self, claim: LeaseClaim, expiry: bytes) -> bytes:
        text = json.dumps(astuple(claim)).encode()
        return hmac.new(self._key, expiry + text, hashlib.sha256).digest()
