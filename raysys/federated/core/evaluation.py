"""Evaluates flat weights: centrally on a test set, and client by client."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raysys.federated.core.ladder import cached_module, sample_losses
from raysys.federated.core.model import FlatWeights, ModelSpec, load_flat
from raysys.federated.core.population import IntArray, Population
from raysys.federated.core.training import Samples

BATCH = 2048
PERCENTILES = (10, 25, 50, 75, 90)


@dataclasses.dataclass(frozen=True, slots=True)
class Score:
    """Mean loss, and accuracy (NaN for regression), over ``n`` samples."""

    loss: float
    accuracy: float
    n: int


def outputs(spec: ModelSpec, weights: FlatWeights, inputs: Tensor) -> Tensor:
    """Outputs of the model in evaluation mode, float32 [N, out]."""
    module = load_flat(cached_module(spec), weights).eval()
    with torch.inference_mode():
        parts = [module(inputs[at : at + BATCH]) for at in range(0, len(inputs), BATCH)]
    module.train()
    return torch.cat(parts)


def mixed_outputs(
    spec: ModelSpec, weights: FlatWeights, mix: Sequence[float] | None, inputs: Tensor
) -> Tensor:
    """Outputs of one model, or of a mixture that behaves like one, float32 [N, out].

    Args:
        weights: [P], or [M, P] of a mixture. mix: weight of each of the M models; None is uniform.

    Returns:
        For a mixture of classifiers, the logarithm of the mean probabilities; of regressors, the
        mean output.
    """
    if weights.ndim == 1:
        return outputs(spec, weights, inputs)
    share = [1.0 / len(weights)] * len(weights) if mix is None else list(mix)
    if len(weights) == 1:
        return outputs(spec, weights[0], inputs)
    found = [outputs(spec, row, inputs) for row in weights]
    if spec.task == "regression":
        return torch.stack([part * own for part, own in zip(found, share)]).sum(dim=0)
    mean = torch.stack([part.softmax(dim=1) * own for part, own in zip(found, share)]).sum(dim=0)
    return mean.clamp_min(1e-12).log()


def evaluate(
    spec: ModelSpec, weights: FlatWeights, samples: Samples, mix: Sequence[float] | None = None
) -> Score:
    """Score a model, or a mixture of models, on samples; see :func:`mixed_outputs`."""
    out = mixed_outputs(spec, weights, mix, samples.inputs)
    loss = float(sample_losses(out, samples.targets, spec.task).mean())
    if spec.task == "regression":
        return Score(loss, float("nan"), len(out))
    hits = (out.argmax(dim=1) == samples.targets).float().mean()
    return Score(loss, float(hits), len(out))


def client_scores(
    spec: ModelSpec,
    weights: FlatWeights,
    samples: Samples,
    population: Population,
    clients: IntArray,
    mix: Sequence[float] | None = None,
) -> npt.NDArray[np.float64]:
    """Accuracy (loss for regression) on each client's own samples, float64 [k]; NaN if it has none.

    These are training samples: the spread over clients is what matters, not the level.
    """
    counts = population.counts(clients)
    rows = np.concatenate([population.samples(int(c)) for c in clients]).astype(np.int64)
    index = torch.from_numpy(rows)
    out = mixed_outputs(spec, weights, mix, samples.inputs[index])
    targets = samples.targets[index]
    if spec.task == "regression":
        value = sample_losses(out, targets, spec.task).numpy()
    else:
        value = (out.argmax(dim=1) == targets).numpy()
    ends = np.cumsum(counts)
    total = np.concatenate(([0.0], np.cumsum(value.astype(np.float64))))
    with np.errstate(invalid="ignore", divide="ignore"):
        means: npt.NDArray[np.float64] = (total[ends] - total[ends - counts]) / counts
    return means


def mean_score(scores: Sequence[Score], clients: Sequence[int]) -> Score:
    """Mean of scores of one test set, weighted by how many clients each of them serves."""
    if len(scores) == 1:
        return scores[0]
    loss = np.average([score.loss for score in scores], weights=clients)
    accuracy = np.average([score.accuracy for score in scores], weights=clients)
    return Score(float(loss), float(accuracy), scores[0].n)


def percentiles(values: npt.NDArray[np.float64]) -> dict[str, float]:
    """The 10th to 90th percentile over clients, by name such as ``"p10"``."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return {}
    found = np.percentile(finite, PERCENTILES)
    return {f"p{p}": float(v) for p, v in zip(PERCENTILES, found)}
