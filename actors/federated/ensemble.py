"""Fed-ensemble on Ray: how the coordinator builds it; :mod:`endpoint` serves it."""

from __future__ import annotations

import functools

from raysys.errors import ConfigError
from raysys.federated.core.engine import FederatedJob
from raysys.federated.core.model import ModelSpec
from raysys.federated.core.population import Population
from raysys.federated.core.recipe import FederatedConfig, make_job, make_line
from raysys.federated.fed_ensemble.ensemble import EnsembleConfig, FedEnsemble


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
