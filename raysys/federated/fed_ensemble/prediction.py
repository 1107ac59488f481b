"""Predictions of an ensemble, what they do not know, and how to calibrate and personalise them.

Sections 4 and 5 of the system's design after the paper: total entropy splits into expected entropy
and mutual information, the disagreement of the members. Averaging under-trained members makes
predictions under-confident, hence one temperature, fitted on losses that clients report. The
paper's client weights are not published; ours are a softmax of the client's own losses.

Dimensions: K members, N samples, C classes.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from raysys.errors import ConfigError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
TEMPERATURES = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0)
COMBINE = ("probabilities", "logits", "vote")
TINY = 1e-12
WORST = 1e6  # stands for a loss that is not finite


@dataclasses.dataclass(frozen=True, slots=True)
class Prediction:
    """What an ensemble says about samples.

    Args:
        probabilities: combined, [N, C]. members: of each member, [K, N, C].
        total_entropy, expected_entropy: nats, [N].
    """

    probabilities: FloatArray
    members: FloatArray
    total_entropy: FloatArray
    expected_entropy: FloatArray

    @property
    def mutual_information(self) -> FloatArray:
        """Disagreement of the members in nats, [N]; never below 0."""
        return np.maximum(self.total_entropy - self.expected_entropy, 0.0)

    @property
    def label_disagreement(self) -> float:
        """Share of samples on which two members differ in the label, mean over pairs."""
        votes = self.members.argmax(axis=2)
        first, second = np.triu_indices(len(votes), 1)
        return float((votes[first] != votes[second]).mean()) if len(first) else 0.0

    @property
    def labels(self) -> IntArray:
        """The most probable class, [N]."""
        best: IntArray = self.probabilities.argmax(axis=1).astype(np.int64)
        return best


def predict(
    logits_KNC: npt.NDArray[np.float32],
    weights: FloatArray | None = None,
    temperature: float = 1.0,
    combine: str = "probabilities",
) -> Prediction:
    """Combine members' outputs.

    Args:
        logits_KNC: float32 logits of each member; members with a non-finite output are left out.
        weights: mixing weights [K], summing to 1; None is uniform.
        temperature: of the combined prediction: ``p^(1/T)``, normalised.
        combine: mean of "probabilities", mean of "logits", or majority "vote".

    Raises:
        ConfigError: no finite member, or weights that are not a distribution.
    """
    if combine not in COMBINE:
        raise ConfigError("combine", combine, f"one of {COMBINE}")
    if not (np.isfinite(temperature) and temperature > 0):
        raise ConfigError("temperature", temperature, "a number above 0")
    mix = _mixing(logits_KNC, weights)
    kept = mix > 0
    logits: FloatArray = logits_KNC[kept].astype(np.float64)
    mix = mix[kept]
    members = softmax(logits)
    if combine == "logits":
        combined: FloatArray = softmax(np.asarray(np.tensordot(mix, logits, axes=1), np.float64))
    elif combine == "vote":
        votes = np.eye(logits.shape[2])[logits.argmax(axis=2)]
        combined = np.asarray(np.tensordot(mix, votes, axes=1), np.float64)
    else:
        combined = np.asarray(np.tensordot(mix, members, axes=1), np.float64)
    combined = sharpen(combined, temperature)
    return Prediction(combined, members, entropy(combined), mix @ entropy(members))


def predict_values(
    outputs_KNO: npt.NDArray[np.float32],
    weights: FloatArray | None = None,
    noise_variance: float = 0.0,
) -> tuple[FloatArray, FloatArray]:
    """Regression: mean of the members, and the standard deviation around it, both [N, O].

    Args:
        noise_variance: estimate of the targets' own noise, added to the members' spread.
    """
    values = np.asarray(outputs_KNO, dtype=np.float64)
    mix = _mixing(outputs_KNO, weights)
    finite = np.where(mix[:, None, None] > 0, values, 0.0)
    mean = np.tensordot(mix, finite, axes=1)
    spread = np.tensordot(mix, (finite - mean) ** 2, axes=1) + noise_variance
    return mean, np.sqrt(spread)


def softmax(logits: FloatArray) -> FloatArray:
    """Softmax over the last axis."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: FloatArray = shifted / shifted.sum(axis=-1, keepdims=True)
    return result


def sharpen(probabilities: FloatArray, temperature: float) -> FloatArray:
    """``p^(1/T)``, normalised; equal to dividing log-probabilities by T."""
    if temperature == 1.0:
        return probabilities
    return softmax(np.log(np.maximum(probabilities, TINY)) / temperature)


def entropy(probabilities: FloatArray) -> FloatArray:
    """Entropy over the last axis, in nats."""
    result: FloatArray = -(probabilities * np.log(np.maximum(probabilities, TINY))).sum(axis=-1)
    return result


def loss_by_temperature(probabilities: FloatArray, labels: IntArray) -> FloatArray:
    """What a client returns: its summed loss at each of :data:`TEMPERATURES`, [8]."""
    return np.array([nll(sharpen(probabilities, t), labels) * len(labels) for t in TEMPERATURES])


def fit_temperature(total_losses: FloatArray, n_samples: int, n_classes_seen: int) -> float:
    """Temperature from clients' summed losses: the minimum of a parabola around the best one.

    Args:
        total_losses: summed over clients, one per temperature. n_samples: their samples.
        n_classes_seen: different labels among them.

    Raises:
        ConfigError: no samples, one class only, or losses that are not finite.
    """
    if n_samples < 1:
        raise ConfigError("validation samples", n_samples, "at least one", "Hold some data out")
    if n_classes_seen < 2:
        raise ConfigError(
            "validation classes", n_classes_seen, "at least two",
            "One class alone is fitted best by absurd confidence",
        )  # fmt: skip
    if total_losses.shape != (len(TEMPERATURES),) or not np.isfinite(total_losses).all():
        raise ConfigError("losses", total_losses.shape, f"{len(TEMPERATURES)} finite sums")
    best = int(np.argmin(total_losses))
    if best in (0, len(TEMPERATURES) - 1):
        return TEMPERATURES[best]
    x = np.log(TEMPERATURES[best - 1 : best + 2])
    a, b, _ = np.polyfit(x, total_losses[best - 1 : best + 2], 2)
    return float(np.exp(-b / (2 * a))) if a > 0 else TEMPERATURES[best]


def personal_weights(losses_nK: FloatArray, lam: float | None = None) -> FloatArray:
    """Mixing weights of one client from its validation losses.

    ``a_k = exp(-n_eff (l_k - min l))`` with n_eff = min(n, 50), mixed with uniform weights by
    lambda; lambda is chosen by leave-one-out unless given.

    Args:
        losses_nK: loss of each member on each validation sample, [n, K]; n may be 0. A member with
            a loss that is not finite gets no weight but its uniform share.
        lam: share of the uniform weights.

    Returns:
        Weights [K] that sum to 1.
    """
    n, k = losses_nK.shape
    losses_nK = np.where(np.isfinite(losses_nK), losses_nK, WORST)
    if n == 0:
        return np.full(k, 1.0 / k)
    if lam is None:
        lam = min((1.0, 0.5, 0.2, 0.05), key=lambda choice: _left_out_loss(losses_nK, choice))
    return _mix_uniform(losses_nK.mean(axis=0), n, lam)


def nll(probabilities: FloatArray, labels: IntArray) -> float:
    """Mean negative log-likelihood.

    Raises:
        ConfigError: labels outside the classes, or rows that are no distributions.
    """
    _check_scored(probabilities, labels)
    picked = probabilities[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(picked, TINY)).mean())


def brier(probabilities: FloatArray, labels: IntArray) -> float:
    """Mean squared distance to the one-hot label; refuses what :func:`nll` refuses."""
    _check_scored(probabilities, labels)
    target = np.eye(probabilities.shape[1])[labels]
    return float(((probabilities - target) ** 2).sum(axis=1).mean())


def expected_calibration_error(
    probabilities: FloatArray, labels: IntArray, bins: int = 15
) -> float:
    """Mean distance of confidence and accuracy over equal bins; refuses what `nll` refuses."""
    _check_scored(probabilities, labels)
    confidence = probabilities.max(axis=1)
    hit = probabilities.argmax(axis=1) == labels
    slot = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    gap = np.bincount(slot, weights=confidence - hit, minlength=bins)
    return float(np.abs(gap).sum() / len(labels))


def auroc(negatives: FloatArray, positives: FloatArray) -> float:
    """Probability that a positive scores above a negative; ties count half."""
    if not len(negatives) or not len(positives):
        raise ConfigError("scores", (len(negatives), len(positives)), "samples of both kinds")
    scores = np.concatenate([negatives, positives])
    values, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    total = ranks[inverse][len(negatives) :].sum()
    n, m = len(negatives), len(positives)
    del values
    return float((total - m * (m + 1) / 2) / (n * m))


def risk_coverage_area(uncertainty: FloatArray, wrong: npt.NDArray[np.bool_]) -> float:
    """Mean error over all coverages when the most certain samples are kept first."""
    order = np.argsort(uncertainty, kind="stable")
    risk = np.cumsum(wrong[order]) / np.arange(1, len(wrong) + 1)
    return float(risk.mean())


def _check_scored(probabilities: FloatArray, labels: IntArray) -> None:
    classes = probabilities.shape[1]
    if len(labels) != len(probabilities) or not len(labels):
        raise ConfigError("labels", len(labels), f"{len(probabilities)}, at least one")
    if labels.min() < 0 or labels.max() >= classes:
        raise ConfigError("labels", f"{labels.min()}..{labels.max()}", f"0..{classes - 1}")
    if not (np.abs(probabilities.sum(axis=1) - 1) < 1e-3).all():
        raise ConfigError("probabilities", "rows of another sum", "rows that sum to 1")


def _mixing(logits_KNC: npt.NDArray[np.float32], weights: FloatArray | None) -> FloatArray:
    k = len(logits_KNC)
    mix = np.full(k, 1.0 / max(k, 1)) if weights is None else np.asarray(weights, dtype=np.float64)
    if mix.shape != (k,) or (mix < 0).any() or abs(mix.sum() - 1) > 1e-6:
        raise ConfigError("weights", mix, f"{k} weights >= 0 that sum to 1")
    mix = np.where(np.isfinite(logits_KNC).all(axis=(1, 2)), mix, 0.0)
    if mix.sum() <= 0:
        raise ConfigError("members", "no finite output", "at least one member that is finite")
    scaled: FloatArray = mix / mix.sum()
    return scaled


def _mix_uniform(mean_losses: FloatArray, n: int, lam: float) -> FloatArray:
    a = np.exp(-min(n, 50) * (mean_losses - mean_losses.min()))
    weights: FloatArray = (1 - lam) * a / a.sum() + lam / len(a)
    return weights


def _left_out_loss(losses_nK: FloatArray, lam: float) -> float:
    """Mean loss on each sample of the mixture whose weights come from the other samples."""
    n = len(losses_nK)
    if n == 1:
        return 0.0 if lam == 1.0 else 1.0
    total = losses_nK.sum(axis=0)
    mixed = [
        -np.log(_mix_uniform((total - row) / (n - 1), n - 1, lam) @ np.exp(-row) + TINY)
        for row in losses_nK
    ]
    return float(np.mean(mixed))
