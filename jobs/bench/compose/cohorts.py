"""Auxo's cohorts as ensemble members, against Auxo alone, Fed-ensemble and one model for all."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from jobs.bench.auxo import runs as auxo_runs
from jobs.bench.fed_ensemble.runs import data_sets, load
from jobs.bench.pieces import Piece, measure_pieces
from raysys.bench import Claim, Profile, paired_claim
from raysys.compose.cohort_members import CohortEnsemble, Logits, Weights, member_logits, weights_of
from raysys.federated.auxo.auxo import Auxo
from raysys.federated.auxo.clustering import adjusted_rand
from raysys.federated.auxo.config import AuxoConfig
from raysys.federated.auxo.planted import Planted, PlantedConfig
from raysys.federated.core.engine import FederatedJob
from raysys.federated.core.messages import ScreenConfig
from raysys.federated.core.model import ModelSpec
from raysys.federated.core.runner import run_round
from raysys.federated.fed_ensemble.ensemble import EnsembleConfig, FedEnsemble
from raysys.federated.fed_ensemble.prediction import Prediction, auroc, predict

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
SCORED, LABELLED, NOVELTY_CLIENTS = 200, 20, 20


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One seed of all arms on one planted population.

    Args:
        planted: how groups differ, and how many clients there are.
        rounds, per_round: of every arm. k: members of the Fed-ensemble without cohorts.
        scored: clients that are scored. labelled: samples that an unknown client has labels for.
    """

    seed: int
    planted: PlantedConfig = dataclasses.field(default_factory=PlantedConfig)
    rounds: int = 150
    per_round: int = auxo_runs.PER_ROUND
    k: int = 4
    scored: int = SCORED
    labelled: int = LABELLED
    auxo: AuxoConfig = dataclasses.field(default_factory=AuxoConfig)

    @property
    def label(self) -> str:
        """The population in a word or two."""
        return f"{self.planted.kind}, {self.planted.groups} groups"

    def piece(self) -> Piece:
        """The run, by itself."""
        name = f"cohorts-{self.planted.kind}-{self.planted.groups}-{self.seed}"
        return Piece(name, dataclasses.asdict(self), functools.partial(run_case, self))


def cohorts_in_ensemble(profile: Profile) -> Claim:
    """Accuracy for a client without a record that has 20 labels: the ensemble over Auxo alone."""
    clients, rounds, seeds = profile.pick((600, 60, range(1)), (1000, 150, range(3)))
    kinds = profile.pick(("labels",), ("labels", "rotation"))
    cases = [
        Case(seed=seed, planted=PlantedConfig(kind=kind, clients=clients), rounds=rounds)
        for kind in kinds
        for seed in seeds
    ]
    rows = measure_pieces(profile.partial, [case.piece() for case in cases])
    ours, theirs = (
        [row["arms"][arm]["unknown_labelled"] for row in rows]
        for arm in ("cohort ensemble", "Auxo alone")
    )
    return paired_claim(
        "cohorts_in_ensemble",
        "accuracy, client without a record, 20 labelled samples",
        "higher",
        ours=ours,
        baseline_name="Auxo alone, the cohort that fits the labels best",
        baseline=theirs,
        seeds=list(seeds),
        extra={"table": _table(rows), "rows": rows},
    )


def run_case(case: Case) -> dict[str, Any]:
    """Train the three jobs on one population and score four ways to predict."""
    torch.set_num_threads(1)
    data = auxo_runs.planted(case.planted, case.seed)
    spec = auxo_runs.spec_of(data.data)
    line = auxo_runs.make_line(spec, "fedavg", case.per_round)
    single = _trained(case, line(), data)
    several = FedEnsemble(EnsembleConfig(k=case.k), case.per_round, line)
    _trained(case, several, data)
    auxo = Auxo(case.auxo, case.per_round, line)
    _trained(case, auxo, data)
    ensemble = CohortEnsemble(auxo)
    n = data.population.n_clients
    clients = np.sort(np.random.default_rng((case.seed, 53)).permutation(n)[: case.scored])
    scorer = Scorer(case, data, spec, clients)
    mixing = np.stack([ensemble.mixing(int(client)) for client in clients])
    best = np.eye(mixing.shape[1])[mixing.argmax(axis=1)]
    return {
        "seed": case.seed,
        "data": data.data.name,
        "population": case.label,
        "cohorts": len(ensemble.leaves),
        "ari": adjusted_rand(auxo.best_leaves(np.arange(n)), data.group_of),
        "arms": {
            "one model": scorer.mixed(single.weights(0)[None], None),
            "Fed-ensemble": scorer.mixed(several.stacked(), None),
            "Auxo alone": scorer.alone(ensemble.members, best),
            "cohort ensemble": scorer.mixed(ensemble.members, mixing),
        },
    }


class Scorer:
    """Scores ways to predict for some clients of a planted population.

    Labelled samples come from the first half of the test set as a client's group sees it, the
    score from the second half, each class weighted by the client's own label mix. Foreign samples
    are Fashion-MNIST where both data sets are there.
    """

    def __init__(self, case: Case, data: Planted, spec: ModelSpec, clients: IntArray) -> None:
        self.data, self.spec, self.clients = data, spec, clients
        self.groups = data.group_of[clients]
        self.half = data.test_targets.shape[1] // 2
        self.own = [self._labelled(case, int(client)) for client in clients]
        here = {"mnist", "fashion"} <= set(data_sets())
        self.foreign = load("fashion", 0).test_inputs if here else None

    def mixed(self, members: Weights, mixing: FloatArray | None) -> dict[str, float]:
        """An ensemble: uniform for the unknown, personal weights with labels.

        Args:
            members: [K, P]. mixing: weights of a client with a record, [clients, K]; None: uniform.
        """
        uniform = np.full(len(members), 1.0 / len(members))
        everyone = np.tile(uniform, (len(self.clients), 1))
        known = everyone if mixing is None else mixing
        logits = self._logits(members)
        personal = np.stack(
            [
                weights_of(predict(logits[group][:, rows]), self.data.test_targets[group][rows])
                for group, rows in zip(self.groups, self.own)
            ]
        )
        return {
            "known": self._accuracy(logits, known),
            "unknown": self._accuracy(logits, everyone),
            "unknown_labelled": self._accuracy(logits, personal),
            **self._novelty(members, logits, known, everyone),
        }

    def alone(self, members: Weights, best: FloatArray) -> dict[str, float]:
        """One cohort's model a client: its own, one drawn at random, or the one that fits best.

        Args:
            best: the cohort of a client with a record, one-hot [clients, K].
        """
        logits, each = self._logits(members), np.eye(len(members))
        fits = []
        for group, rows in zip(self.groups, self.own):
            said = predict(logits[group][:, rows]).members
            truth = self.data.test_targets[group][rows]
            losses = -np.log(np.maximum(said[:, np.arange(len(rows)), truth], 1e-12)).mean(axis=1)
            fits.append(each[int(losses.argmin())])
        drawn = [np.tile(row, (len(self.clients), 1)) for row in each]
        novelty = [self._novelty(members, logits, best, one) for one in drawn]
        return {
            "known": self._accuracy(logits, best),
            "unknown": statistics.mean(self._accuracy(logits, one) for one in drawn),
            "unknown_labelled": self._accuracy(logits, np.stack(fits)),
            **{name: statistics.mean(row[name] for row in novelty) for name in novelty[0]},
        }

    def _labelled(self, case: Case, client: int) -> IntArray:
        """Rows of the first half that a client has labels for, by its label mix."""
        rng = np.random.default_rng((case.seed, client, 59))
        targets = self.data.test_targets[self.data.group_of[client]][: self.half]
        chance = self.data.mix[client][targets] / np.bincount(targets)[targets]
        chance /= chance.sum()
        size = min(case.labelled, int((chance > 0).sum()))
        return rng.choice(self.half, size, replace=False, p=chance)

    def _logits(self, members: Weights) -> list[Logits]:
        """Of each group's view of the test set, [groups][K, N, C]."""
        return [member_logits(self.spec, members, view) for view in self.data.test_inputs]

    def _accuracy(self, logits: list[Logits], mixing: FloatArray) -> float:
        """Mean over clients; clients of a group with the same weights are predicted once."""
        kept: dict[tuple[int, bytes], FloatArray] = {}
        scores = []
        for client, group, weights in zip(self.clients, self.groups, mixing):
            key = int(group), weights.tobytes()
            if key not in kept:
                labels = predict(logits[group][:, self.half :], weights).labels
                truth = self.data.test_targets[group][self.half :]
                count = np.maximum(np.bincount(truth, minlength=self.data.data.classes), 1)
                hits = np.bincount(truth, weights=labels == truth, minlength=self.data.data.classes)
                kept[key] = hits / count
            scores.append(float(kept[key] @ self.data.mix[client]))
        return statistics.mean(scores)

    def _novelty(
        self, members: Weights, logits: list[Logits], known: FloatArray, unknown: FloatArray
    ) -> dict[str, float]:
        """AUROC of foreign samples for the first clients, with a record and without.

        By mutual information where members are weighed alike, else by the largest probability;
        ``auroc_unknown_confidence`` is by the largest probability always.
        """
        if self.foreign is None:
            return {}
        foreign = member_logits(self.spec, members, self.foreign)
        found: dict[str, list[float]] = {}
        for group, *both in list(zip(self.groups, known, unknown))[:NOVELTY_CLIENTS]:
            for name, weights in zip(("auroc_known", "auroc_unknown"), both):
                inside = predict(logits[group][:, self.half :], weights)
                outside = predict(foreign, weights)
                alike = len(weights) > 1 and bool(np.ptp(weights) < 1e-9)
                strange = auroc(_strangeness(inside, alike), _strangeness(outside, alike))
                found.setdefault(name, []).append(strange)
            confidence = auroc(_strangeness(inside, False), _strangeness(outside, False))
            found.setdefault("auroc_unknown_confidence", []).append(confidence)
        return {name: statistics.mean(values) for name, values in found.items()}


def _strangeness(prediction: Prediction, by_disagreement: bool) -> FloatArray:
    if by_disagreement:
        return prediction.mutual_information
    confidence: FloatArray = prediction.probabilities.max(axis=1)
    return -confidence


def _trained(case: Case, strategy: Any, data: Planted) -> Any:
    screen = ScreenConfig(min_fraction=0.5)
    job = FederatedJob(strategy, data.population, case.seed, screen=screen)
    samples = data.data.samples()
    for _ in range(case.rounds):
        run_round(job, samples)
    return strategy


def _table(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Means over seeds, by population and arm."""
    return {
        population: {
            arm: {
                field: statistics.mean(row["arms"][arm][field] for row in mine)
                for field in mine[0]["arms"][arm]
            }
            for arm in mine[0]["arms"]
        }
        for population in dict.fromkeys(row["population"] for row in rows)
        for mine in [[row for row in rows if row["population"] == population]]
    }
