"""Fed-ensemble on Ray: how the coordinator builds it, and the endpoint that serves it."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raysys.errors import ConfigError
from raysys.federated.core.engine import FederatedJob
from raysys.federated.core.evaluation import outputs
from raysys.federated.core.model import ModelSpec
from raysys.federated.core.population import Population
from raysys.federated.core.recipe import FederatedConfig, make_job, make_line
from raysys.federated.fed_ensemble.ensemble import EnsembleConfig, FedEnsemble
from raysys.federated.fed_ensemble.prediction import predict


def build_ensemble(
    config: FederatedConfig, ensemble: EnsembleConfig, spec: ModelSpec, population: Population
) -> FederatedJob:
    """A job whose strategy is an ensemble of the recipe's model lines.

    Raises:
        ConfigError: SCAFFOLD inside an ensemble: its control variates belong to one model; privacy
            or asynchronous rounds, which need the sampling of one line.
    """
    for name in ("privacy", "asynchronous"):
        if getattr(config, name) is not None:
            raise ConfigError(f"recipe.{name}", "set", "none in an ensemble")
    if config.server.name == "scaffold":
        raise ConfigError("recipe.server.name", "scaffold", "another server in an ensemble")
    make_inner = functools.partial(make_line, config, spec)
    strategy = FedEnsemble(ensemble, config.clients_per_round, make_inner)
    return make_job(config, spec, population, strategy)


class EnsembleEndpoint:
    """Answers prediction and disagreement over HTTP; wrap with ``ray.serve.deployment``.

    Args:
        spec: the members' architecture. members: weights, float32 [K, P].
        shape: shape of one sample. temperature: of the combined prediction.
    """

    def __init__(
        self,
        spec: ModelSpec,
        members: npt.NDArray[np.float32],
        shape: tuple[int, ...],
        temperature: float = 1.0,
    ) -> None:
        torch.set_num_threads(1)
        self._spec = spec
        self._members = members
        self._shape = shape
        self._temperature = temperature

    async def __call__(self, request: Any) -> Any:
        """POST ``{"inputs": [...], "weights": [...]}``; weights are personal and optional."""
        from starlette.responses import JSONResponse

        try:
            body = await request.json()
        except ValueError:
            return JSONResponse({"error": "expected a JSON body with inputs"}, status_code=400)
        try:
            return JSONResponse(self.answer(body))
        except ConfigError as error:
            return JSONResponse({"error": str(error)}, status_code=422)

    def answer(self, body: Any) -> dict[str, Any]:
        """Predict for a decoded request.

        Raises:
            ConfigError: inputs of another shape or not finite, or weights that do not fit.
        """
        if not isinstance(body, dict) or "inputs" not in body:
            raise ConfigError("inputs", None, f"a list of samples of shape {self._shape}")
        try:
            inputs = np.asarray(body["inputs"], dtype=np.float32)
            weights = None if body.get("weights") is None else np.asarray(body["weights"], float)
        except (TypeError, ValueError):
            raise ConfigError("inputs", body["inputs"], "nested lists of numbers") from None
        if inputs.shape[1:] != self._shape or not len(inputs) or not np.isfinite(inputs).all():
            raise ConfigError("inputs", inputs.shape, f"finite samples of shape {self._shape}")
        x = torch.from_numpy(inputs)
        logits = np.stack([outputs(self._spec, row, x).numpy() for row in self._members])
        found = predict(logits, weights, self._temperature)
        return {
            "labels": found.labels.tolist(),
            "probabilities": found.probabilities.tolist(),
            "disagreement": found.mutual_information.tolist(),
            "entropy": found.total_entropy.tolist(),
        }

    def health(self) -> dict[str, Any]:
        """Number of members."""
        return {"members": len(self._members)}

    def close(self) -> None:
        """Nothing to release."""
