"""KGT freezing layers inside federated clients, as a program."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jobs.bench.compose import frozen
from jobs.bench.pieces import Piece
from jobs.compose.composition import Composition, Measure, Row
from raysys.compose.frozen_clients import FreezeConfig
from raysys.config import check, check_range

ARMS = {
    "fedavg": "all layers trained",
    "kgt": "KGT",
    "linear": "linear schedule, equal upload",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The federated job and how the server freezes.

    Args:
        rounds: of each arm. hidden: widths of the MLP. clients, per_round: of the population, and
            of a round.
        freeze: when the server looks and how it decides.
        seeds: how many seeds, from ``seed`` on.
    """

    rounds: int = 60
    hidden: tuple[int, ...] = (128, 128, 128)
    clients: int = 100
    per_round: int = 10
    freeze: FreezeConfig = dataclasses.field(default_factory=FreezeConfig)
    seeds: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        check_range(self, "rounds", 1)
        check_range(self, "clients", 1)
        check_range(self, "per_round", 1, self.clients)
        check_range(self, "seeds", 1)
        usable = bool(self.hidden) and min(self.hidden) >= 1
        check(self, "hidden", usable, "one or more widths of at least 1")


def _pieces(config: Config) -> Sequence[Piece]:
    return [
        frozen.Case(
            seed=seed, rounds=config.rounds, hidden=config.hidden, clients=config.clients,
            per_round=config.per_round, freeze=config.freeze,
        ).piece()
        for seed in range(config.seed, config.seed + config.seeds)
    ]  # fmt: skip


def _rows(found: dict[str, Any]) -> Sequence[Row]:
    return [
        {
            "arm": name,
            "seed": found["seed"],
            "data": found["data"],
            "accuracy": found[arm]["accuracy"],
            "cpu_s": found[arm]["cpu_s"],
            "uploaded_mb": found[arm]["bytes_up"] / 1e6,
            "frozen_after": ", ".join(map(str, found[arm]["frozen_at"])),
        }
        for arm, name in ARMS.items()
    ]


KGT_IN_CLIENTS = Composition(
    name="kgt_in_clients",
    title="KGT inside federated clients",
    problem="Layers that have converged by KGT's criterion are neither trained nor sent by the "
    "clients any more, against training all layers and against freezing at equal intervals.",
    config=Config,
    pieces=_pieces,
    rows=_rows,
    measures=(
        Measure(name="accuracy", heading="accuracy", better="higher"),
        Measure(name="cpu_s", heading="CPU time, s", digits=2, better="lower"),
        Measure(name="uploaded_mb", heading="uploaded, MB", digits=1, better="lower"),
    ),
    notes=("The linear schedule is chosen after the fact so that it sends as much as KGT did.",),
)
