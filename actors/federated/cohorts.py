"""Auxo on Ray: how the coordinator builds it, alone or over an ensemble."""

from __future__ import annotations

import functools
from typing import Any

from raysys.errors import ConfigError
from raysys.federated.auxo.auxo import Auxo
from raysys.federated.auxo.config import AuxoConfig
from raysys.federated.auxo.explain import explain as explain_cohorts
from raysys.federated.core.engine import FederatedJob
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.model import ModelSpec
from raysys.federated.core.population import Population
from raysys.federated.core.recipe import FederatedConfig, make_job, make_line
from raysys.federated.core.strategy import Strategy
from raysys.federated.fed_ensemble.ensemble import EnsembleConfig, FedEnsemble


def build_auxo(
    config: FederatedConfig,
    auxo: AuxoConfig,
    ensemble: EnsembleConfig | None,
    spec: ModelSpec,
    population: Population,
) -> FederatedJob:
    """A job whose strategy puts the recipe's model line, or an ensemble of it, into cohorts.

    Raises:
        ConfigError: a line with control variates or a buffer, which belong to one model; or more
            members of an ensemble than every cohort has clients for.
    """
    if config.server.name == "scaffold" or config.asynchronous is not None:
        name = "asynchronous" if config.asynchronous is not None else "server.name"
        raise ConfigError(f"recipe.{name}", "set", "a plain model line inside cohorts")
    line = functools.partial(make_line, config, spec)
    make_inner = functools.partial(_inner, config, ensemble, line)
    strategy = Auxo(auxo, config.clients_per_round, make_inner)
    return make_job(config, spec, population, strategy)


def explain(strategy: Any) -> dict[str, Any]:
    """What a strategy has to say about its decisions; empty for one that decides nothing."""
    inner = getattr(strategy, "inner", strategy)  # devices from Venn are wrapped around it
    return explain_cohorts(inner) if isinstance(inner, Auxo) else {}


def _inner(
    config: FederatedConfig, ensemble: EnsembleConfig | None, line: functools.partial[FedAvg]
) -> Strategy:
    if ensemble is None:
        return line()
    most = max(1, config.clients_per_round // 16)
    if ensemble.k > most:
        raise ConfigError(
            "ensemble.k", ensemble.k, f"at most {most} in two cohorts of this budget",
            "Eight clients per member and cohort are needed: raise recipe.clients_per_round",
        )  # fmt: skip
    return FedEnsemble(ensemble, config.clients_per_round, line)
