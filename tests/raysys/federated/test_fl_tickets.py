"""Lease tickets: only the device, lease and round that were signed for, and only in time."""

from __future__ import annotations

import dataclasses
import math

import pytest

from raysys.errors import ConfigError, InfeasibleError
from raysys.federated.core.tickets import LEEWAY_S, TICKET_BYTES, LeaseClaim, LeaseSeal

SEAL = LeaseSeal(b"s" * 32)
CLAIM = LeaseClaim(device="aa", gateway="g", epoch=7, counter=2**40, job_id="j", round=3)


def test_a_genuine_ticket_lasts_to_its_end_and_a_little_longer() -> None:
    ticket = SEAL.issue(CLAIM, 100.0)
    assert len(ticket) == TICKET_BYTES
    SEAL.check(CLAIM, ticket, 0.0)
    SEAL.check(CLAIM, ticket, 100.0 + LEEWAY_S)
    with pytest.raises(InfeasibleError, match="has expired"):
        SEAL.check(CLAIM, ticket, 100.1 + LEEWAY_S)
    with pytest.raises(InfeasibleError, match="has expired"):
        SEAL.check(CLAIM, SEAL.issue(CLAIM, math.nan), 0.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "ab"},
        {"gateway": "g2"},
        {"epoch": 8},
        {"counter": 1},
        {"job_id": "k"},
        {"round": 4},
        {"gateway": 'g", 7', "epoch": 0},
    ],
)
def test_a_ticket_for_something_else_is_refused(changes: dict[str, object]) -> None:
    ticket = SEAL.issue(CLAIM, 100.0)
    with pytest.raises(ConfigError, match="signed for this device"):
        SEAL.check(dataclasses.replace(CLAIM, **changes), ticket, 0.0)


def test_forged_cut_and_missing_tickets_are_refused() -> None:
    ticket = SEAL.issue(CLAIM, 100.0)
    other = LeaseSeal(b"t" * 32).issue(CLAIM, 100.0)
    stretched = SEAL.issue(CLAIM, 1e9)[:8] + ticket[8:]
    for forged in (other, stretched, ticket[:-1], ticket + b"x", bytes(TICKET_BYTES), b"x"):
        with pytest.raises(ConfigError, match="signed for this device"):
            SEAL.check(CLAIM, forged, 0.0)
    with pytest.raises(ConfigError, match="came with the lease"):
        SEAL.check(CLAIM, b"", 0.0)
    with pytest.raises(ConfigError, match="32"):
        LeaseSeal(b"short")
