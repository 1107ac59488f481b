"""Auxo's cohorts as the members of an ensemble, as a program."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jobs.bench.auxo.runs import PER_ROUND
from jobs.bench.compose import cohorts
from jobs.bench.pieces import Piece
from jobs.compose.composition import Composition, Measure, Row
from raysys.config import check_range
from raysys.federated.auxo.config import AuxoConfig
from raysys.federated.auxo.planted import PlantedConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The population and the three jobs on it.

    Args:
        planted: how groups of clients differ, and how many clients there are.
        rounds, per_round: of each job. k: members of the Fed-ensemble without cohorts.
        scored: clients that are scored. labelled: samples that an unknown client has labels for.
        auxo: the cohorts.
        seeds: how many seeds, from ``seed`` on.
    """

    planted: PlantedConfig = dataclasses.field(default_factory=PlantedConfig)
    rounds: int = 100
    per_round: int = PER_ROUND
    k: int = 4
    scored: int = cohorts.SCORED
    labelled: int = cohorts.LABELLED
    auxo: AuxoConfig = dataclasses.field(default_factory=AuxoConfig)
    seeds: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("rounds", "k", "scored", "labelled", "seeds"):
            check_range(self, field, 1)
        check_range(self, "per_round", self.auxo.p_min, self.planted.clients)


def _pieces(config: Config) -> Sequence[Piece]:
    return [
        cohorts.Case(
            seed=seed, planted=config.planted, rounds=config.rounds, per_round=config.per_round,
            k=config.k, scored=config.scored, labelled=config.labelled, auxo=config.auxo,
        ).piece()
        for seed in range(config.seed, config.seed + config.seeds)
    ]  # fmt: skip


def _rows(found: dict[str, Any]) -> Sequence[Row]:
    kept = {key: found[key] for key in ("seed", "data", "population", "cohorts", "ari")}
    return [{"arm": arm, **kept, **values} for arm, values in found["arms"].items()]


COHORTS_IN_ENSEMBLE = Composition(
    name="cohorts_in_ensemble",
    title="Auxo's cohorts as the members of an ensemble",
    problem="Every cohort's model is a member: a client with a record mixes them by its "
    "membership, one without takes them all alike, or by labelled samples; against a Fed-ensemble "
    "without cohorts, Auxo alone and one model for all.",
    config=Config,
    pieces=_pieces,
    rows=_rows,
    measures=(
        Measure(name="known", heading="accuracy, known client", better="higher"),
        Measure(name="unknown", heading="accuracy, unknown client", better="higher"),
        Measure(name="unknown_labelled", heading="accuracy, unknown with labels", better="higher"),
        Measure(name="auroc_known", heading="AUROC, known client", better="higher"),
        Measure(name="auroc_unknown", heading="AUROC, unknown client", better="higher"),
    ),
    notes=(
        "Auxo alone gives an unknown client a cohort at random, or the one that its labels fit.",
        "AUROC tells Fashion-MNIST from the clients' own test samples, by mutual information where "
        "members are weighed alike, else by the largest probability.",
    ),
)
