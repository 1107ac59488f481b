"""Settings of FedTrans, with the printed formulas as switches (table of section 7 of the spec)."""

from __future__ import annotations

import dataclasses

from raysys.config import check, check_choice, check_range


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GrowthConfig:
    """When and where a model grows.

    Args:
        enabled: False is plain federated averaging of the first model.
        delta, gamma: rounds between the two ends of a loss slope; number of slopes averaged.
        beta: largest mean slope, in loss units a round, that counts as converged.
        beta_relative: the same as a share of the model's first smoothed loss; replaces ``beta``.
        smooth: rounds in the moving mean of the loss.
        alpha: cells more active than this share of the most active one are transformed.
        activeness_rounds: rounds averaged for the activeness (T).
        widen: factor. split: how a wider cell gets its new units: "fresh", "uneven", "equal" (as
            printed), or "noise"; see :class:`~raysys.federated.fedtrans.transform.Step`.
        select: "active", or "random" cells as many (ablation).
        warm_start: False draws new weights for a new model (ablation).
        max_models: most models in training at once; each should get five clients a round.
        capacity_rounds: rounds in which the largest capacity must have been seen.
        end_round: no model is derived after this round, so that the last one has time to learn.
    """

    enabled: bool = True
    delta: int = 20
    gamma: int = 10
    beta: float = 0.003
    beta_relative: float | None = None
    smooth: int = 5
    alpha: float = 0.9
    activeness_rounds: int = 5
    widen: float = 4.0
    split: str = "fresh"
    select: str = "active"
    warm_start: bool = True
    max_models: int = 4
    capacity_rounds: int = 50
    end_round: int | None = None

    def __post_init__(self) -> None:
        for name in ("delta", "gamma", "smooth", "activeness_rounds", "max_models"):
            check_range(self, name, 1)
        check_range(self, "capacity_rounds", 1)
        check_range(self, "beta", 0)
        if self.beta_relative is not None:
            check_range(self, "beta_relative", 0, 1)
        check_range(self, "alpha", 0, 1, high_open=True)
        check(self, "widen", 1 < self.widen <= 64, "a number above 1 and at most 64")
        check_choice(self, "split", ("fresh", "uneven", "equal", "noise"))
        check_choice(self, "select", ("active", "random"))
        if self.end_round is not None:
            check_range(self, "end_round", 0)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MixtureConfig:
    """How models lend weights to their descendants.

    Args:
        what: "updates": a relative's update of this round counts as training of the model, or
            "weights": its weights are averaged in (as printed); "nothing" trains every model alone
            after its birth (ablation).
        lend: updates go "down" to descendants only (as printed), or "both" ways.
        eta: decay of a relative's share per round of the younger model's age; 1 never decays.
        clock: "age" of the receiving model, or the "round" of the job (as printed).
        normalise: False leaves ``eta`` out of the denominator (as printed; weights then shrink).
        projection: "lineage" through the stored unit maps, or "crop" by position (as printed).
    """

    what: str = "updates"
    lend: str = "both"
    eta: float = 1.0
    clock: str = "age"
    normalise: bool = True
    projection: str = "lineage"

    def __post_init__(self) -> None:
        check_choice(self, "what", ("updates", "weights", "nothing"))
        check_choice(self, "lend", ("both", "down"))
        check_range(self, "eta", 0, 1, low_open=True)
        check_choice(self, "clock", ("age", "round"))
        check_choice(self, "projection", ("lineage", "crop"))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AssignmentConfig:
    """Which model a client trains.

    Args:
        sample_s: seconds that a device may spend on one sample's forward pass: its capacity in
            multiply-accumulates is ``population.rate_mac_s * sample_s``.
        temperature: of the softmax over utilities; 1 is the paper.
        bound: largest distance of a utility from the client's best, so that probabilities never
            freeze.
        peers: participants of one model that make its own loss statistics; with fewer those of
            the whole round are used.
        head_start: utility that a new model has above its parent's: it begins as the same function
            and can learn more, so more than half of those that can run it should train it.
        retire_rounds, retire_share: a model that got a smaller share of the participants in so
            many rounds is retired, unless it is the smallest or the newest. 0 keeps all.
    """

    sample_s: float = 1.0
    temperature: float = 1.0
    bound: float = 8.0
    peers: int = 5
    head_start: float = 1.0
    retire_rounds: int = 100
    retire_share: float = 0.02

    def __post_init__(self) -> None:
        check_range(self, "sample_s", 0, low_open=True)
        check_range(self, "temperature", 0, low_open=True)
        check_range(self, "bound", 0, low_open=True)
        check_range(self, "peers", 2)
        check_range(self, "head_start", 0, self.bound)
        check_range(self, "retire_rounds", 0)
        check_range(self, "retire_share", 0, 1)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FedTransConfig:
    """All settings of FedTrans."""

    growth: GrowthConfig = dataclasses.field(default_factory=GrowthConfig)
    mixture: MixtureConfig = dataclasses.field(default_factory=MixtureConfig)
    assignment: AssignmentConfig = dataclasses.field(default_factory=AssignmentConfig)
