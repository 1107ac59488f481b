"""What Auxo may be told: thresholds, budget, and which rules are the published ones."""

from __future__ import annotations

import dataclasses

from raysys.config import check, check_choice, check_range
from raysys.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RuleConfig:
    """Each departure from the published rules, as a switch; the defaults are ours.

    Args:
        features: "signal" clusters within the subspace that both halves of the clients' work agree
            on, "raw" clusters whole sketches (published).
        k_choice: "stability" takes the largest stable K, "two" always cuts in two (published).
        gate: "corrected" compares noise-corrected dispersions, "literal" is the published
            criterion, "none" leaves the decision to stability, agreement and coverage.
        own_centroid: keep a client's own update in the centroid it is compared with (published).
        scale: "robust" is median + 4 MAD of the members, "mean_std" is published.
        propagation: "negative" lends failures to related cohorts, weighted like the reward;
            "printed" adds every reward, undamped (published).
        probation: an update of a newcomer is not folded until its cohort has accepted one.
        loss_evidence: the loss on the received weights counts half of the reward.
        anchors: a client without a cohort trains the weights of the last split once and is placed
            by the result; otherwise it tries cohorts at random (published).
    """

    features: str = "signal"
    k_choice: str = "stability"
    gate: str = "corrected"
    own_centroid: bool = False
    scale: str = "robust"
    propagation: str = "negative"
    probation: bool = True
    loss_evidence: bool = True
    anchors: bool = True

    def __post_init__(self) -> None:
        check_choice(self, "features", ("signal", "raw"))
        check_choice(self, "k_choice", ("stability", "two"))
        check_choice(self, "gate", ("corrected", "literal", "none"))
        check_choice(self, "scale", ("robust", "mean_std"))
        check_choice(self, "propagation", ("negative", "printed"))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AuxoConfig:
    """Cohorts.

    Args:
        k_max: largest number of parts of one split. max_leaves: most cohorts at a time.
        gamma: weight of a new reward. eps_0, eps_decay: exploration of a new cohort, and what it
            is multiplied by each round.
        start_round: first round whose updates are clustered.
        stab_min, agree_min, cover: what stability, label agreement and coverage a split needs.
        dispersion_max: largest share of the dispersion that may be left inside the clusters.
        p_min: participants per round that a cohort needs. min_share: smallest share of the
            labelled members that a part may have.
        window: rounds that stability and agreement are averaged over.
        sketch_dim: numbers of a client's sketch. subspace_decay: memory of the signal subspace.
        budget: "sqrt" shares devices by the root of the members, "equal" is published, "arrivals"
            takes devices as they come.
        merge_after: rounds below ``p_min`` after which a cohort joins its sibling; 0 never merges.
        block: put clients whose updates keep falling outside their cohort on the block list.
        max_records: affinity records kept; the longest unseen go first. None keeps all.
        rules: which rules are ours and which are the published ones.
    """

    k_max: int = 6
    max_leaves: int = 8
    gamma: float = 0.2
    eps_0: float = 0.1
    eps_decay: float = 0.97
    start_round: int = 2
    stab_min: float = 0.8
    agree_min: float = 0.85
    cover: float = 0.3
    dispersion_max: float = 0.6
    p_min: int = 10
    min_share: float = 0.1
    window: int = 6
    sketch_dim: int = 128
    subspace_decay: float = 0.9
    budget: str = "sqrt"
    merge_after: int = 20
    block: bool = True
    max_records: int | None = None
    rules: RuleConfig = dataclasses.field(default_factory=RuleConfig)

    def __post_init__(self) -> None:
        check_range(self, "k_max", 2, 16)
        check_range(self, "max_leaves", 1, 64)
        check_range(self, "gamma", 0, 1, low_open=True)
        check_range(self, "eps_0", 0, 1)
        check_range(self, "eps_decay", 0, 1)
        check_range(self, "start_round", 0)
        for name in ("stab_min", "agree_min", "cover", "min_share"):
            check_range(self, name, 0, 1)
        check_range(self, "dispersion_max", 0, low_open=True)
        check_range(self, "p_min", 2)
        check_range(self, "window", 1)
        check_range(self, "sketch_dim", 8, 65536)
        check_range(self, "subspace_decay", 0, 1, high_open=True)
        check_choice(self, "budget", ("sqrt", "equal", "arrivals"))
        check_range(self, "merge_after", 0)
        if self.max_records is not None:
            check(self, "max_records", self.max_records >= 1, "None or at least 1")

    def check_budget(self, clients_per_round: int) -> None:
        """Raise a ConfigError where not even one cohort can have its participants."""
        if clients_per_round < self.p_min:
            raise ConfigError(
                "clients_per_round", clients_per_round, f"at least auxo.p_min = {self.p_min}",
                "Ask for more devices per round, or lower auxo.p_min",
            )  # fmt: skip


def repaired(**changes: object) -> AuxoConfig:
    """The printed rules without their two worst faults: undamped lending, and no coverage wait."""
    base = published(cover=0.85)
    rules = dataclasses.replace(base.rules, propagation="negative")
    return dataclasses.replace(base, rules=rules, **changes)  # type: ignore[arg-type]


def published(**changes: object) -> AuxoConfig:
    """The printed rules. The literal criterion never fires, so the gate is agreement (point 5)."""
    rules = RuleConfig(
        features="raw",
        k_choice="two",
        gate="none",
        own_centroid=True,
        scale="mean_std",
        propagation="printed",
        probation=False,
        loss_evidence=False,
        anchors=False,
    )
    base = AuxoConfig(rules=rules, eps_0=0.3, cover=0.0, budget="equal", merge_after=0, block=False)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]
