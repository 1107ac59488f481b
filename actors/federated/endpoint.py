"""A trained model or ensemble over HTTP, on Ray Serve: prediction, disagreement, personal weights.

    POST /predict   {"inputs": [...], "weights": [...]}   labels, probabilities, disagreement
    POST /personal  {"inputs": [...], "labels": [...]}    mixing weights for that client's samples
    GET  /health                                          members, shape of a sample, task

``disagreement`` (mutual information, nats) is the score for samples unlike the training data.
Personal weights are answered and not kept: the client sends them with its next prediction.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from raysys.errors import ConfigError
from raysys.federated.core.evaluation import outputs
from raysys.federated.core.model import ModelSpec
from raysys.federated.fed_ensemble.prediction import (
    FloatArray,
    personal_weights,
    predict,
    predict_values,
    softmax,
)

MAX_SAMPLES = 4096
_OK, _BAD_JSON, _NOT_FOUND, _WRONG = 200, 400, 404, 422


class PredictBody(BaseModel):
    """Samples, and optionally mixing weights of the members."""

    model_config = ConfigDict(extra="forbid")
    inputs: list[Any]
    weights: list[float] | None = None


class PersonalBody(BaseModel):
    """A client's own labelled samples."""

    model_config = ConfigDict(extra="forbid")
    inputs: list[Any]
    labels: list[int]


class EnsembleEndpoint:
    """Answers requests; wrap with ``ray.serve.deployment``.

    Args:
        spec: the members' architecture. members: weights, float32 [K, P].
        shape: shape of one sample. tokens: number of different tokens, 0 for real-valued inputs.
        temperature: of the combined prediction.
    """

    def __init__(
        self,
        spec: ModelSpec,
        members: npt.NDArray[np.float32],
        shape: tuple[int, ...],
        temperature: float = 1.0,
        tokens: int = 0,
    ) -> None:
        torch.set_num_threads(1)
        self._spec = spec
        self._members = members
        self._shape = shape
        self._tokens = tokens
        self._temperature = temperature

    async def __call__(self, request: Any) -> Any:
        """Route a Starlette request; every answer is JSON, errors say what was expected."""
        from starlette.responses import JSONResponse

        path = request.url.path.rstrip("/")
        if request.method == "GET" and path.endswith("/health"):
            return JSONResponse(self.health())
        routes = {"predict": self.answer, "personal": self.personal}
        name = path.rpartition("/")[2]
        if request.method != "POST" or name not in routes:
            error = "expected POST /predict, POST /personal or GET /health"
            return JSONResponse({"error": error}, status_code=_NOT_FOUND)
        try:
            body = await request.json()
        except ValueError:
            error = "expected a JSON body with inputs"
            return JSONResponse({"error": error}, status_code=_BAD_JSON)
        try:
            return JSONResponse(routes[name](body))
        except (ConfigError, ValidationError) as error:
            text = f"expected other values: {error}"
            return JSONResponse({"error": text}, status_code=_WRONG)

    def answer(self, body: Any) -> dict[str, Any]:
        """Predict for a decoded request.

        Raises:
            ValidationError: not the body of a prediction.
            ConfigError: inputs of another shape or not finite, or weights that do not fit.
        """
        asked = PredictBody.model_validate(body)
        raw = self._outputs(asked.inputs)
        weights = None if asked.weights is None else np.asarray(asked.weights, dtype=np.float64)
        if self._spec.task == "regression":
            mean, spread = predict_values(raw, weights)
            return {"values": mean.tolist(), "spread": spread.tolist()}
        found = predict(raw, weights, self._temperature)
        return {
            "labels": found.labels.tolist(),
            "probabilities": found.probabilities.tolist(),
            "disagreement": found.mutual_information.tolist(),
            "entropy": found.total_entropy.tolist(),
        }

    def personal(self, body: Any) -> dict[str, Any]:
        """Mixing weights from a client's labelled samples; nothing is kept.

        Raises:
            ValidationError, ConfigError: as for :meth:`answer`; labels out of range.
        """
        asked = PersonalBody.model_validate(body)
        if self._spec.task == "regression":
            raise ConfigError("task", "regression", "a classifier for personal weights")
        probabilities = softmax(self._outputs(asked.inputs).astype(np.float64))
        labels = np.asarray(asked.labels, dtype=np.int64)
        n, classes = probabilities.shape[1:]
        if labels.shape != (n,) or labels.min() < 0 or labels.max() >= classes:
            raise ConfigError("labels", asked.labels[:5], f"{n} numbers from 0 to {classes - 1}")
        picked = probabilities[:, np.arange(n), labels].T
        losses: FloatArray = -np.log(np.maximum(picked, 1e-12))
        mix = personal_weights(losses)
        return {"weights": mix.tolist(), "member_losses": losses.mean(axis=0).tolist()}

    def health(self) -> dict[str, Any]:
        """Number of members, shape of a sample, task, temperature."""
        return {
            "members": len(self._members),
            "shape": list(self._shape),
            "task": self._spec.task,
            "temperature": self._temperature,
        }

    def close(self) -> None:
        """Nothing to release."""

    def _outputs(self, inputs: list[Any]) -> npt.NDArray[np.float32]:
        """Outputs of all members, float32 [K, N, C]."""
        kind = np.int64 if self._tokens else np.float32
        try:
            x = np.asarray(inputs, dtype=kind)
        except (TypeError, ValueError, OverflowError):
            raise ConfigError("inputs", "something else", "nested lists of numbers") from None
        if x.shape[1:] != self._shape or not 1 <= len(x) <= MAX_SAMPLES or not np.isfinite(x).all():
            raise ConfigError(
                "inputs", x.shape, f"1 to {MAX_SAMPLES} finite samples of shape {self._shape}"
            )
        if self._tokens and not 0 <= x.min() <= x.max() < self._tokens:
            raise ConfigError("inputs", int(x.max()), f"tokens from 0 to {self._tokens - 1}")
        tensor = torch.from_numpy(x)
        return np.stack([outputs(self._spec, row, tensor).numpy() for row in self._members])
