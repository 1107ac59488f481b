"""Swan phones that Venn grants to three concurrent jobs, as a program."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jobs.bench.compose import fleet
from jobs.bench.pieces import Piece
from jobs.compose.composition import Composition, Measure, Row
from raysys.config import check, check_range


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The population and what is crossed.

    Args:
        phones: of the population. rounds, participants: of each of the three jobs.
        policies: who grants. uses: who chooses a phone's cores.
        seeds: how many seeds, from ``seed`` on.
    """

    phones: int = fleet.PHONES_QUICK
    rounds: int = 10
    participants: int = 20
    policies: tuple[str, ...] = fleet.POLICIES
    uses: tuple[str, ...] = fleet.USES
    seeds: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_range(self, "phones", 10)
        check_range(self, "rounds", 1)
        check_range(self, "participants", 10)
        check_range(self, "seeds", 1)
        for field, known in (("policies", fleet.POLICIES), ("uses", fleet.USES)):
            chosen = getattr(self, field)
            wanted = f"some of {', '.join(known)}"
            check(self, field, bool(chosen) and set(chosen) <= set(known), wanted)


def _pieces(config: Config) -> Sequence[Piece]:
    arms = [
        fleet.Arm(
            policy=policy, use=use, seed=seed, phones=config.phones, rounds=config.rounds,
            participants=config.participants,
        )
        for seed in range(config.seed, config.seed + config.seeds)
        for policy in config.policies
        for use in config.uses
    ]  # fmt: skip
    return [arm.piece() for arm in arms]


def _rows(found: dict[str, Any]) -> Sequence[Row]:
    row: Row = {"arm": f"{found['policy']}, {found['use']}", "seed": found["seed"]}
    row |= {name: found[name] for name in ("data", "mean_completion_h", "kilojoules", "excluded")}
    for name, job in found["jobs"].items():
        row |= {f"{name}_{field}": value for field, value in job.items()}
    return [row]


SHARED_FLEET = Composition(
    name="shared_fleet",
    title="One population of phones, three federated jobs",
    problem="Swan's phones are granted by Venn, or at random, to an Auxo, a FedTrans and a "
    "Fed-ensemble job at once; they train on the cores that Swan chooses, or greedily on all "
    "fast ones. Learning is real, clock and joules are the simulator's and the SoC model's.",
    config=Config,
    pieces=_pieces,
    rows=_rows,
    measures=(
        Measure(
            name="mean_completion_h", heading="mean completion, hours", digits=1, better="lower"
        ),
        *(
            Measure(name=f"{name}_accuracy", heading=f"accuracy of {name}", better="higher")
            for name in fleet.NAMES
        ),
        Measure(name="kilojoules", heading="energy, kJ", digits=0, better="lower"),
        Measure(name="excluded", heading="phone-days kept out", digits=0, better="lower"),
    ),
    notes=("An arm is who grants, then who chooses the cores.",),
)
