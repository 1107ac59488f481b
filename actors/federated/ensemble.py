"""Fed-ensemble on Ray: how the coordinator builds it; :mod:`endpoint` serves it."""

from __future__ import annotations

import functools

from raysys.errors import ConfigError
from raysys.federated.core.engine import FederatedJob
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.model import ModelSpec
from raysys.federated.core.population import Population
from raysys.federated.core.recipe import FederatedConfig, make_job, make_line
from raysys.federated.fed_ensemble.buffered import BufferedEnsemble
from raysys.federated.fed_ensemble.ensemble import EnsembleConfig, FedEnsemble


def build_ensemble(
    config: FederatedConfig, ensemble: EnsembleConfig, spec: ModelSpec, population: Population
) -> FederatedJob:
    """A job whose strategy is an ensemble of the recipe's model lines.

    Raises:
        ConfigError: SCAFFOLD inside an ensemble: its control variates belong to one model; a warm
            start or a shared trunk with central privacy or asynchronous rounds.
    """
    if config.server.name == "scaffold":
        raise ConfigError("recipe.server.name", "scaffold", "another server in an ensemble")
    k = config.clients_per_round
    if config.asynchronous is None:
        make_inner = functools.partial(make_line, config, spec)
        strategy = FedEnsemble(ensemble, k, make_inner)
    else:
        make_inner = functools.partial(_uniform_line, config, spec)
        strategy = BufferedEnsemble(ensemble, k, make_inner, config.asynchronous)
    return make_job(config, spec, population, strategy)


def _uniform_line(config: FederatedConfig, spec: ModelSpec) -> FedAvg:
    """One member of an asynchronous ensemble; answers count alike, as in FedBuff."""
    server = config.server.optimizer()
    return FedAvg(spec, config.local, config.clients_per_round, server, "uniform")
