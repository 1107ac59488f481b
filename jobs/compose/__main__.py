"""Run several systems together, against the same without one of them.

    raysys compose list                                    what there is, and what runs elsewhere
    raysys compose shared_fleet --set phones=400           Venn, Swan, Auxo, FedTrans, Fed-ensemble
    raysys compose kgt_in_clients --set rounds=60          KGT freezes layers in federated clients
    raysys compose ccs_in_lte_tuning --set keeps=[0.3]     LTE tuned on a coreset that CCS chose
    raysys compose cohorts_in_ensemble --set rounds=100    Auxo's cohorts as an ensemble's members

Each takes --config FILE, --set a.b=VALUE and --run-dir; --help lists its fields. Rows go into the
run directory as Parquet, means and config into result.json, the page is report.html.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from jobs.commands import run_command
from jobs.compose.ccs_in_lte_tuning import CCS_IN_LTE_TUNING
from jobs.compose.cohorts_in_ensemble import COHORTS_IN_ENSEMBLE
from jobs.compose.composition import Composition
from jobs.compose.kgt_in_clients import KGT_IN_CLIENTS
from jobs.compose.shared_fleet import SHARED_FLEET
from jobs.launcher import Job

COMPOSITIONS: Sequence[Composition[Any]] = (
    SHARED_FLEET,
    KGT_IN_CLIENTS,
    CCS_IN_LTE_TUNING,
    COHORTS_IN_ENSEMBLE,
)
COMMANDS: dict[str, Job[Any]] = {found.name: found.job() for found in COMPOSITIONS}
ELSEWHERE = {
    "raysys lte serve": "an LTE model under Andes, its threshold moving with the load",
    "raysys bench kgt --only kgt_on_coreset": "a CCS coreset feeding KGT's activation cache",
    "raysys federate --set auxo.k_max=4 --set ensemble.k=2": "an ensemble inside every cohort",
    "raysys federate --set venn.scheduler=HOST:PORT": "federated jobs on devices of a Venn",
    "raysys embed serve": "FIITED's tables behind an HTTP endpoint",
}


def command_line(arguments: Sequence[str] | None = None) -> int:
    """Run one of the compositions, or list them; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words == ["list"]:
        print("\n".join(listing()))
        return 0
    return run_command("compose", __doc__, COMMANDS, words)


def listing() -> list[str]:
    """What there is, a line each, then what other commands run."""
    here = {f"raysys compose {found.name}": found.title for found in COMPOSITIONS}
    width = max(map(len, {**here, **ELSEWHERE}))
    return [f"{command:<{width}}  {text}" for command, text in {**here, **ELSEWHERE}.items()]


if __name__ == "__main__":
    raise SystemExit(command_line())
