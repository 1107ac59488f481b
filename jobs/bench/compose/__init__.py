"""Compositions: several systems in one run, against the same without one of them."""

from __future__ import annotations

import dataclasses

from jobs.bench.compose import cohorts, fleet, frozen, tuning
from raysys.bench import ClaimFunction

CONFIG = {
    "shared_fleet": {
        "phones": fleet.PHONES_FULL, "online": fleet.ONLINE, "unit_s": fleet.UNIT_S,
        "policies": list(fleet.POLICIES), "use": list(fleet.USES),
    },
    "kgt_in_clients": dataclasses.asdict(frozen.Case(seed=0, rounds=60)),
    "ccs_in_lte_tuning": dataclasses.asdict(tuning.Case(seed=0)),
    "cohorts_in_ensemble": dataclasses.asdict(cohorts.Case(seed=0)),
}  # fmt: skip

CLAIMS: dict[str, ClaimFunction] = {
    "shared_fleet": fleet.shared_fleet,
    "kgt_in_clients": frozen.kgt_in_clients,
    "ccs_in_lte_tuning": tuning.ccs_in_lte_tuning,
    "cohorts_in_ensemble": cohorts.cohorts_in_ensemble,
}
