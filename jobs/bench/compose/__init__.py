"""Compositions: several systems in one run, against the same without one of them."""

from __future__ import annotations

from jobs.bench.compose import fleet
from raysys.bench import ClaimFunction

CONFIG = {
    "shared_fleet": {
        "phones": fleet.PHONES_FULL, "online": fleet.ONLINE, "unit_s": fleet.UNIT_S,
        "policies": list(fleet.POLICIES), "use": list(fleet.USES),
    },
}  # fmt: skip

CLAIMS: dict[str, ClaimFunction] = {
    "shared_fleet": fleet.shared_fleet,
}
