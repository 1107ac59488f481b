"""How the claims of Fed-ensemble score trained models: accuracy, calibration, novelty, persons."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raysys.federated.core.datasets import FederatedData
from raysys.federated.core.evaluation import outputs
from raysys.federated.core.model import ModelSpec
from raysys.federated.core.population import Population
from raysys.federated.fed_ensemble.prediction import (
    auroc,
    expected_calibration_error,
    fit_temperature,
    loss_by_temperature,
    nll,
    personal_weights,
    predict,
    sharpen,
    softmax,
)

Weights = npt.NDArray[np.float32]
VALIDATION = 20  # samples of a client that choose its personal weights


def logits(spec: ModelSpec, members: Weights, inputs: npt.NDArray[np.float32]) -> Weights:
    """Outputs of every member, float32 [K, N, C]."""
    x = torch.from_numpy(np.ascontiguousarray(inputs))
    return np.stack([outputs(spec, row, x).numpy() for row in members])


def accuracy(spec: ModelSpec, members: Weights, data: FederatedData) -> float:
    """Accuracy of the mean of the members' probabilities on the central test set."""
    labels = predict(logits(spec, members, data.test_inputs)).labels
    return float((labels == data.test_targets).mean())


def calibrated_nll(spec: ModelSpec, members: Weights, data: FederatedData) -> dict[str, float]:
    """Likelihood and calibration on half of the test set, before and after one temperature.

    The temperature is fitted on the other half, dealt to ten clients that return losses only.
    """
    labels = data.test_targets
    half = len(labels) // 2
    p = predict(logits(spec, members, data.test_inputs)).probabilities
    parts = np.array_split(np.arange(half), 10)
    total = np.sum([loss_by_temperature(p[part], labels[part]) for part in parts], axis=0)
    temperature = fit_temperature(total, half, len(np.unique(labels[:half])))
    after = sharpen(p[half:], temperature)
    return {
        "before": nll(p[half:], labels[half:]),
        "after": nll(after, labels[half:]),
        "ece_before": expected_calibration_error(p[half:], labels[half:]),
        "ece_after": expected_calibration_error(after, labels[half:]),
        "temperature": temperature,
    }


def novelty(
    spec: ModelSpec,
    members: Weights,
    inside: npt.NDArray[np.float32],
    outside: npt.NDArray[np.float32],
) -> dict[str, float]:
    """AUROC of telling foreign samples from known ones, by score."""
    known, foreign = (predict(logits(spec, members, x)) for x in (inside, outside))
    pairs: dict[str, Any] = {
        "max_probability": [-p.probabilities.max(axis=1) for p in (known, foreign)],
        "total_entropy": [p.total_entropy for p in (known, foreign)],
        "mutual_information": [p.mutual_information for p in (known, foreign)],
    }
    return {name: auroc(low, high) for name, (low, high) in pairs.items()}


def personal_gain(
    spec: ModelSpec, members: Weights, data: FederatedData, population: Population
) -> float:
    """Accuracy of personal over uniform weights on clients with few classes, a share.

    Each client validates on 20 test samples of its classes and is scored on the others.
    """
    probabilities = softmax(logits(spec, members, data.test_inputs).astype(np.float64))
    labels = data.test_targets
    rng = np.random.default_rng(0)
    gaps = []
    for client in range(population.n_clients):
        own = np.unique(data.targets[population.samples(client)])
        rows = rng.permutation(np.flatnonzero(np.isin(labels, own)))
        validation, rest = rows[:VALIDATION], rows[VALIDATION:]
        losses = -np.log(np.maximum(probabilities[:, validation, labels[validation]].T, 1e-12))
        mix = personal_weights(losses)
        personal = np.tensordot(mix, probabilities[:, rest], axes=1).argmax(axis=1)
        uniform = probabilities[:, rest].mean(axis=0).argmax(axis=1)
        gaps.append((personal == labels[rest]).mean() - (uniform == labels[rest]).mean())
    return float(np.mean(gaps))
