"""Learning with devices that somebody else has granted: the same bits as drawing them oneself."""

from __future__ import annotations

import numpy as np
import pytest

from raysys.compose.granted import GrantedJob
from raysys.errors import InfeasibleError
from raysys.federated.core.engine import FederatedJob
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.recipe import (
    FederatedConfig,
    ModelConfig,
    load_data,
    make_line,
    make_population,
)
from raysys.federated.core.runner import run_round

RECIPE = FederatedConfig(
    seed=4, clients_per_round=6, model=ModelConfig(hidden=(8,)), local=LocalConfig(steps=2)
)


def test_granted_rounds_equal_drawn_ones() -> None:
    data = load_data(RECIPE.data, RECIPE.seed, None)
    population, spec = make_population(RECIPE, data), RECIPE.model.spec(data)
    drawn = FederatedJob(make_line(RECIPE, spec), population, RECIPE.seed)
    granted = GrantedJob(make_line(RECIPE, spec), population, data.samples(), RECIPE.seed)
    for _ in range(3):
        report = run_round(drawn, data.samples())
        mine = granted.round(report.table.clients + population.n_clients)  # devices, not clients
        assert np.array_equal(mine.table.clients, report.table.clients)
    assert np.array_equal(granted.strategy.weights(0), drawn.strategy.weights(0))


def test_too_few_granted_clients_are_refused() -> None:
    data = load_data(RECIPE.data, RECIPE.seed, None)
    population, spec = make_population(RECIPE, data), RECIPE.model.spec(data)
    job = GrantedJob(make_line(RECIPE, spec), population, data.samples(), RECIPE.seed, 0.9)
    with pytest.raises(InfeasibleError, match="round 0"):
        job.round(np.array([1, 2]))
