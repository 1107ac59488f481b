"""Auxo and FedTrans on Ray: how the coordinator builds them, alone or one inside the other."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from raysys.errors import ConfigError
from raysys.federated.auxo.auxo import Auxo
from raysys.federated.auxo.config import AuxoConfig
from raysys.federated.auxo.explain import explain as explain_cohorts
from raysys.federated.core.engine import FederatedJob
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.model import ModelSpec, Weights
from raysys.federated.core.population import Population
from raysys.federated.core.recipe import FederatedConfig, make_job, make_line
from raysys.federated.core.server import OPTIMIZERS
from raysys.federated.core.strategy import Strategy
from raysys.federated.fed_ensemble.ensemble import EnsembleConfig, FedEnsemble
from raysys.federated.fedtrans.config import FedTransConfig
from raysys.federated.fedtrans.explain import explain as explain_family
from raysys.federated.fedtrans.network import CellNet
from raysys.federated.fedtrans.strategy import FedTrans


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
    _check_plain(config)
    line = functools.partial(make_line, config, spec)
    make_inner = functools.partial(_inner, config, ensemble, line)
    strategy = Auxo(auxo, config.clients_per_round, make_inner)
    return make_job(config, spec, population, strategy)


def build_family(
    config: FederatedConfig,
    family: FedTransConfig,
    auxo: AuxoConfig | None,
    net: CellNet,
    population: Population,
) -> FederatedJob:
    """A job whose strategy grows a family of models, or one in every cohort of clients.

    Args:
        net: the first model. auxo: find cohorts as well, or None.

    Raises:
        ConfigError: a line whose sums cannot be lent to a relative.
    """
    for name in ("privacy", "asynchronous", "robust"):
        if getattr(config, name) is not None:
            raise ConfigError(f"recipe.{name}", "set", "none in a family: its models lend means")
    if config.server.name not in OPTIMIZERS:
        known = f"one of {tuple(OPTIMIZERS)} in a family"
        raise ConfigError("recipe.server.name", config.server.name, known)
    make = functools.partial(_family, config, family, net)
    strategy = make() if auxo is None else Auxo(auxo, config.clients_per_round, make)
    return make_job(config, net.spec(), population, strategy)


def explain(strategy: Any) -> dict[str, Any]:
    """What a strategy has to say about its decisions; empty for one that decides nothing.

    Cohorts with a family in each have their facts by the cohort's name, in ``families``.
    """
    inner = getattr(strategy, "inner", strategy)  # devices from Venn are wrapped around it
    if isinstance(inner, FedTrans):
        return explain_family(inner)
    if not isinstance(inner, Auxo):
        return {}
    lines = {leaf: inner.forest.line(leaf) for leaf in inner.tree.leaves}
    families = {leaf: line for leaf, line in lines.items() if isinstance(line, FedTrans)}
    found = {}
    if families:
        homes = inner.best_leaves(np.arange(inner.forest.facts.population.n_clients))
        found = {
            inner.tree.name(leaf): explain_family(line, np.flatnonzero(homes == leaf))
            for leaf, line in families.items()
        }
    return {**explain_cohorts(inner), "families": found}


def _check_plain(config: FederatedConfig) -> None:
    if config.server.name == "scaffold" or config.asynchronous is not None:
        name = "asynchronous" if config.asynchronous is not None else "server.name"
        raise ConfigError(f"recipe.{name}", "set", "a plain model line inside cohorts")


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


def _family(config: FederatedConfig, family: FedTransConfig, net: CellNet) -> FedTrans:
    def line(spec: ModelSpec, start: Weights | None) -> FedAvg:
        made = make_line(config, spec)
        if start is not None:
            made.replace(start.values)
        return made

    return FedTrans(net, config.clients_per_round, line, family)
