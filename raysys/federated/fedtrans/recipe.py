"""FedTrans by configuration: the first model from a job's recipe, and how fast devices are."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from raysys.config import check_range
from raysys.errors import ConfigError, DataError
from raysys.federated.core.datasets import FederatedData, must_exist
from raysys.federated.core.population import Population
from raysys.federated.core.recipe import ModelConfig
from raysys.federated.fedtrans.cells import Cell, Conv, Dense
from raysys.federated.fedtrans.config import (  # noqa: F401 - types of inherited fields, for `make docs`
    AssignmentConfig,
    FedTransConfig,
    GrowthConfig,
    MixtureConfig,
)
from raysys.federated.fedtrans.network import CellNet, cell_from_dict

FloatArray = npt.NDArray[np.float64]
SPEEDS = 32  # number of the random stream; a constant, so that seeds keep their populations


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FamilyConfig(FedTransConfig):
    """A family that grows while it is trained, and the devices that it has to fit.

    Args:
        cells: cells of the first model, such as ``{kind: Conv, channels: 4, pool: true}``; none
            makes them of the recipe's model (mlp or cnn).
        spread: simulated devices are from 1 to so many times as fast as the first model needs,
            log-uniformly.
        speeds_csv: measured speeds instead: a table with columns ``client`` (its number) and
            ``mac_s`` (multiply-accumulates a second), one row a client.
    """

    cells: tuple[dict[str, Any], ...] = ()
    spread: float = 32.0
    speeds_csv: str | None = None

    def __post_init__(self) -> None:
        check_range(self, "spread", 1)


def first_net(family: FamilyConfig, model: ModelConfig, data: FederatedData) -> CellNet:
    """The model that the family starts with.

    Raises:
        ConfigError: samples that are tokens, a model that is no chain of cells, or cells that do
            not fit the samples or one another.
    """
    if data.vocabulary:
        raise ConfigError("recipe.data", data.name, "samples that are numbers", "Not tokens")
    return CellNet(
        shape=tuple(int(side) for side in data.inputs.shape[1:]),
        cells=tuple(map(cell_from_dict, family.cells)) or _cells_of(model),
        classes=data.classes or int(data.targets.shape[1]),
        task="classification" if data.classes else "regression",
    )


def with_speeds(
    population: Population, net: CellNet, family: FamilyConfig, seed: int
) -> Population:
    """The population with device speeds: those it has, else measured or simulated ones.

    Raises:
        DataError: a client without a speed, or with two.
    """
    if family.speeds_csv is not None:
        rates = _read_speeds(Path(family.speeds_csv), population.n_clients)
    elif population.rate_mac_s is not None:
        return population
    else:
        slowest_mac_s = net.macs() / family.assignment.sample_s
        rates = simulated_speeds(population.n_clients, slowest_mac_s, family.spread, seed)
    return dataclasses.replace(population, rate_mac_s=rates)


def simulated_speeds(clients: int, slowest_mac_s: float, spread: float, seed: int) -> FloatArray:
    """Speeds from ``slowest_mac_s`` to ``spread`` times that, log-uniformly, float64 [clients]."""
    drawn = np.random.default_rng([seed, SPEEDS]).uniform(0, np.log(spread), clients)
    rates: FloatArray = slowest_mac_s * np.maximum(np.exp(drawn), 1.0)
    return rates


def _cells_of(model: ModelConfig) -> tuple[Cell, ...]:
    dense = tuple(Dense(width=width) for width in model.hidden)
    if model.kind == "mlp" and dense:
        return dense
    if model.kind == "cnn":
        hidden = () if model.hidden == ModelConfig().hidden else dense  # as the core's own
        return (*(Conv(channels=width, pool=True) for width in model.channels), *hidden)
    raise ConfigError(
        "recipe.model.kind", model.kind, "mlp with a hidden layer, or cnn",
        "Or list family.cells",
    )  # fmt: skip


def _read_speeds(path: Path, clients: int) -> FloatArray:
    must_exist(path)
    found: dict[int, float] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            try:
                client, speed = int(row["client"]), float(row["mac_s"])
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(
                    str(path), f"row {row} is not a client and its mac_s ({error!r})", "Correct it"
                ) from error
            if client in found:
                raise DataError(str(path), f"lists client {client} twice", "Correct it")
            found[client] = speed
    missing = set(range(clients)) - set(found)
    if missing:
        raise DataError(str(path), f"has no client {min(missing)}", f"List 0 to {clients - 1}")
    return np.array([found[client] for client in range(clients)])
