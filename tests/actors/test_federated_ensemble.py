"""The ensemble's endpoint as a plain class, and an ensemble trained through Ray."""

from __future__ import annotations

import asyncio
import functools
import json
import types
from typing import Any

import numpy as np
import pytest

from actors.federated.driver import FederatedRun
from actors.federated.endpoint import EnsembleEndpoint
from actors.federated.ensemble import build_ensemble
from actors.session import Session
from raysys.errors import ConfigError
from raysys.federated.core.model import Mlp, ModelSpec, initial_weights
from raysys.federated.core.recipe import (
    FederatedConfig,
    ModelConfig,
    ServerConfig,
    load_data,
    make_population,
)
from raysys.federated.core.runner import run_rounds
from raysys.federated.fed_ensemble.ensemble import EnsembleConfig

SPEC = ModelSpec(architecture=Mlp(sizes=(4, 6, 3)))


class Request:
    """What the endpoint needs of a Starlette request."""

    def __init__(self, body: str, path: str = "/predict", method: str = "POST") -> None:
        self._body = body
        self.method = method
        self.url = types.SimpleNamespace(path=path)

    async def json(self) -> Any:
        return json.loads(self._body)


@pytest.fixture
def endpoint() -> EnsembleEndpoint:
    members = np.stack([initial_weights(SPEC, 0, k).values for k in range(3)])
    return EnsembleEndpoint(SPEC, members, (4,))


def ask(
    endpoint: EnsembleEndpoint, body: str, path: str = "/predict", method: str = "POST"
) -> tuple[int, Any]:
    response = asyncio.run(endpoint(Request(body, path, method)))
    return response.status_code, json.loads(response.body)


def test_endpoint_answers_prediction_and_disagreement(endpoint: EnsembleEndpoint) -> None:
    status, answer = ask(endpoint, json.dumps({"inputs": [[0.1, 0.2, 0.3, 0.4]] * 2}))
    assert status == 200
    assert np.sum(answer["probabilities"], axis=1) == pytest.approx([1, 1])
    assert answer["disagreement"][0] > 0
    assert answer["labels"][0] == int(np.argmax(answer["probabilities"][0]))
    _, personal = ask(
        endpoint, json.dumps({"inputs": [[0.1, 0.2, 0.3, 0.4]], "weights": [1.0, 0.0, 0.0]})
    )
    assert personal["probabilities"][0] != pytest.approx(answer["probabilities"][0])
    status, facts = ask(endpoint, "", "/health", "GET")
    assert (status, facts["members"], facts["shape"]) == (200, 3, [4])
    assert ask(endpoint, "", "/nowhere")[0] == 404
    sample = {"inputs": [[0.1, 0.2, 0.3, 0.4]] * 8, "labels": [answer["labels"][0]] * 8}
    status, own = ask(endpoint, json.dumps(sample), "/personal")
    assert status == 200
    assert sum(own["weights"]) == pytest.approx(1)
    assert np.argmax(own["weights"]) == np.argmin(own["member_losses"])
    wrong = json.dumps({**sample, "labels": [7] * 8})
    assert ask(endpoint, wrong, "/personal")[0] == 422
    endpoint.close()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("not json", 400),
        ("[]", 422),
        ('{"inputs": [[1, 2]]}', 422),
        ('{"inputs": [["a", 1, 2, 3]]}', 422),
        ('{"inputs": []}', 422),
        ('{"inputs": [[1, 2, 3, 4]], "weights": [1, 1, 1]}', 422),
    ],
)
def test_endpoint_refuses_bad_requests(endpoint: EnsembleEndpoint, body: str, status: int) -> None:
    code, answer = ask(endpoint, body)
    assert code == status
    assert "expected" in answer["error"]


def test_ensemble_through_ray_equals_one_process(ray_session: Session) -> None:
    recipe = FederatedConfig(seed=2, clients_per_round=60, model=ModelConfig(hidden=(8,)))
    config = EnsembleConfig(k=3)
    data = load_data(recipe.data, recipe.seed, None)
    population, spec = make_population(recipe, data), recipe.model.spec(data)
    make = functools.partial(build_ensemble, recipe, config, spec)
    here = make(population)
    run_rounds(here, data.samples(), 3)
    run = FederatedRun(recipe, data, population, spec, workers=2, worker_cpus=0, make=make)
    assert len(list(run.rounds(3))) == 3
    for member in range(3):
        assert np.array_equal(run.weights(member), here.strategy.weights(member))
    run.close()
    with pytest.raises(ConfigError, match="scaffold"):
        build_ensemble(
            FederatedConfig(server=ServerConfig(name="scaffold")), config, spec, population
        )
