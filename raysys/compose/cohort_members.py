"""Auxo's cohorts as the members of a Fed-ensemble: one model a cohort, combined at inference.

A client with a record mixes the members by its membership, the softmax of Auxo's rewards over 0.1:
nearly its own cohort's model alone. A client that Auxo has never seen has no rewards, so the same
formula gives it the uniform ensemble; some labelled samples turn that into Fed-ensemble's personal
weights. Disagreement of the members is read as in any ensemble.

Unlike Fed-ensemble's members, cohorts are trained on different clients: they differ because the
data do, not because of their starts alone.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from raysys.errors import ConfigError
from raysys.federated.auxo.auxo import STRIDE, Auxo
from raysys.federated.core.evaluation import outputs
from raysys.federated.core.model import ModelSpec
from raysys.federated.fed_ensemble.prediction import Prediction, personal_weights, predict

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float32]
Logits = npt.NDArray[np.float32]
TINY = 1e-12


class CohortEnsemble:
    """The models of an Auxo job's cohorts, frozen as they are now.

    Args:
        auxo: a started job with one model of one architecture in every cohort.

    Raises:
        ConfigError: cohorts whose models differ in their specification.
    """

    def __init__(self, auxo: Auxo) -> None:
        self.leaves = tuple(int(leaf) for leaf in auxo.tree.leaves)
        models = [leaf * STRIDE for leaf in self.leaves]
        self.spec: ModelSpec = auxo.model_spec(models[0])
        others = {auxo.model_spec(model).spec_id for model in models}
        if others != {self.spec.spec_id}:
            raise ConfigError(
                "cohorts", sorted(others), "one specification",
                "Members are combined sample by sample: give Auxo a line with one model",
            )  # fmt: skip
        self.members: Weights = np.stack([auxo.weights(model) for model in models])
        self._auxo = auxo

    def mixing(self, client: int) -> FloatArray:
        """Weights of the members for a client, [K]: its membership, uniform for an unknown one."""
        membership = self._auxo.membership(client)
        return np.array([membership[leaf] for leaf in self.leaves])

    def logits(self, inputs: npt.NDArray[np.float32]) -> Logits:
        """Outputs of every member, float32 [K, N, C]."""
        return member_logits(self.spec, self.members, inputs)

    def predict(
        self, inputs: npt.NDArray[np.float32], weights: FloatArray | None = None
    ) -> Prediction:
        """Combined prediction; None weighs all cohorts alike."""
        return predict(self.logits(inputs), weights)

    def personal(self, inputs: npt.NDArray[np.float32], labels: IntArray) -> FloatArray:
        """Weights [K] of a client without a record, from its labelled samples."""
        return weights_of(predict(self.logits(inputs)), labels)


def member_logits(spec: ModelSpec, members: Weights, inputs: npt.NDArray[np.float32]) -> Logits:
    """Outputs of each of [K, P] models, float32 [K, N, C]."""
    samples = torch.from_numpy(np.ascontiguousarray(inputs))
    return np.stack([outputs(spec, row, samples).numpy() for row in members])


def weights_of(prediction: Prediction, labels: IntArray) -> FloatArray:
    """Fed-ensemble's personal weights [K] from what the members say of labelled samples."""
    picked = prediction.members[:, np.arange(len(labels)), labels]
    return personal_weights(-np.log(np.maximum(picked, TINY)).T)
