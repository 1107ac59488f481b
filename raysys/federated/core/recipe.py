"""A federated job as one configuration: data, split, model, local training, server, devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from raysys.config import check, check_choice, check_range
from raysys.errors import CapabilityError, ConfigError
from raysys.federated.core.datasets import (
    FederatedData,
    load_digits_data,
    load_fashion_data,
    load_mnist_data,
)
from raysys.federated.core.devices import DeviceConfig
from raysys.federated.core.engine import ExecutionConfig, FederatedJob
from raysys.federated.core.fedavg import FedAvg, QFedAvg
from raysys.federated.core.fedbuff import AsyncConfig, FedBuff
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.messages import ScreenConfig
from raysys.federated.core.model import (
    Cnn,
    ContextMlp,
    EmbeddingBag,
    FromFactory,
    Mlp,
    ModelSpec,
    Task,
)
from raysys.federated.core.natural_data import (
    load_leaf_data,
    load_movielens_data,
    load_shakespeare_data,
)
from raysys.federated.core.own_data import (
    load_cifar_data,
    load_npz_data,
    load_parquet_data,
    with_clients,
)
from raysys.federated.core.partition import PartitionConfig, partition
from raysys.federated.core.population import Population
from raysys.federated.core.privacy import PrivacyConfig, PrivateAvg
from raysys.federated.core.robust import RobustAvg, RobustConfig
from raysys.federated.core.scaffold import Scaffold
from raysys.federated.core.server import OPTIMIZERS, Adam, Averaging, Momentum, ServerOptimizer
from raysys.federated.core.strategy import Strategy

OWN = ("npz", "parquet", "leaf", "cifar")
DATA = ("digits", "mnist", "fashion-mnist", "shakespeare", "movielens", *OWN)
FOLDERS = {
    "mnist": "mnist-t10k",
    "fashion-mnist": "fashion-mnist",
    "shakespeare": "tinyshakespeare/input.txt",
    "movielens": "ml-latest-small",
}


KINDS = ("linear", "mlp", "cnn", "bag", "context", "factory")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which samples.

    Args:
        name: "digits" (packaged), "mnist" and "fashion-mnist" (files in the data folder), "npz"
            (your own archive at ``path``; arrays ``inputs``, ``targets``, optionally ``client``),
            "parquet" (your own table at ``path``; a column ``target``, optionally ``client``),
            "leaf" (LEAF's JSON at ``path``), "cifar" (a folder of CIFAR's python batches),
            "shakespeare" (speakers) or "movielens" (raters; both files in the data folder).
        clients_csv: table with columns client and index that deals your own samples to clients.
        side: side of the images after pooling, for the image sets.
        train: keep a seeded subset of Fashion-MNIST's training samples; None keeps all.
    """

    name: str = "digits"
    path: str | None = None
    clients_csv: str | None = None
    side: int = 14
    train: int | None = None

    def __post_init__(self) -> None:
        check_choice(self, "name", DATA)
        own = self.name in OWN
        check(self, "path", own == (self.path is not None), f"a path, for {OWN} only")
        fits = own or self.clients_csv is None
        check(self, "clients_csv", fits, f"a table of clients, for {OWN} only")
        check_range(self, "side", 1)
        if self.train is not None:
            check_range(self, "train", 1)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which model.

    Args:
        kind: "linear", "mlp", "cnn", "bag" or "context" (embeddings of tokens, averaged or side by
            side), or "factory" for a module of your own.
        dim: size of an embedding. hidden: sizes of hidden layers.
        channels: channels of the convolution blocks.
        factory: ``"package.module:function"``. arguments: keyword arguments of it.
    """

    kind: str = "mlp"
    hidden: tuple[int, ...] = (64,)
    channels: tuple[int, ...] = (8, 16)
    dim: int = 8
    factory: str | None = None
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice(self, "kind", KINDS)
        check(self, "factory", (self.kind == "factory") == bool(self.factory), "a factory name")

    def spec(self, data: FederatedData) -> ModelSpec:
        """The model for a data set.

        Raises:
            ConfigError: a convolutional net for samples that are not images.
        """
        shape = data.inputs.shape[1:]
        out = data.classes or data.targets.shape[1]
        task: Task = "classification" if data.classes else "regression"
        if self.kind == "factory":
            assert self.factory is not None
            pairs = tuple(sorted(self.arguments.items()))
            return ModelSpec(
                architecture=FromFactory(factory=self.factory, arguments=pairs), task=task
            )
        if (self.kind in ("bag", "context")) != bool(data.vocabulary):
            expected = "bag or context" if data.vocabulary else "a model of numbers, not tokens"
            raise ConfigError("model.kind", self.kind, f"{expected} for this data")
        if self.kind in ("bag", "context"):
            return ModelSpec(
                architecture=self._embedding(data.vocabulary, shape[0], out), task=task
            )
        if self.kind == "cnn":
            if len(shape) != 3:
                raise ConfigError("model.kind", "cnn", "mlp or linear for samples of this shape")
            image = (int(shape[0]), int(shape[1]), int(shape[2]))
            hidden = () if self.hidden == (64,) else self.hidden
            cnn = Cnn(image=image, channels=self.channels, hidden=hidden, classes=out)
            return ModelSpec(architecture=cnn, task=task)
        inner = self.hidden if self.kind == "mlp" else ()
        return ModelSpec(architecture=Mlp(sizes=(int(np.prod(shape)), *inner, out)), task=task)

    def _embedding(self, vocabulary: int, context: int, out: int) -> EmbeddingBag | ContextMlp:
        if self.kind == "bag":
            return EmbeddingBag(vocabulary=vocabulary, dim=self.dim, classes=out)
        hidden = self.hidden[0] if self.hidden else 64
        return ContextMlp(
            vocabulary=vocabulary, context=context, dim=self.dim, hidden=hidden, classes=out
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """How the server moves the model.

    Args:
        name: "fedavg", "fedavgm", "fedadam", "fedyogi", "qfedavg", or "scaffold".
        eta: server step; None takes the optimiser's default.
        beta: momentum of FedAvgM. beta1, beta2, tau: FedAdam and FedYogi. q: q-FedAvg.
        weighting: "samples" or "uniform".
    """

    name: str = "fedavg"
    eta: float | None = None
    beta: float = 0.9
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    q: float = 1.0
    weighting: str = "samples"

    def __post_init__(self) -> None:
        check_choice(self, "name", (*OPTIMIZERS, "qfedavg", "scaffold"))
        check_choice(self, "weighting", ("samples", "uniform"))
        check_range(self, "q", 0)
        self.optimizer()

    def optimizer(self) -> ServerOptimizer:
        """A fresh server optimiser."""
        kind = OPTIMIZERS.get(self.name, Averaging)
        eta = {} if self.eta is None else {"eta": self.eta}
        if issubclass(kind, Adam):
            return kind(beta1=self.beta1, beta2=self.beta2, tau=self.tau, **eta)
        return kind(beta=self.beta, **eta) if issubclass(kind, Momentum) else kind(**eta)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FederatedConfig:
    """Everything that decides the outcome of a federated job.

    Args:
        robust: median or trimmed mean instead of the mean. privacy: differential privacy.
        asynchronous: buffered asynchronous rounds. At most one of these three.
    """

    seed: int = 0
    clients_per_round: int = 20
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    partition: PartitionConfig = dataclasses.field(default_factory=PartitionConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    local: LocalConfig = dataclasses.field(default_factory=LocalConfig)
    server: ServerConfig = dataclasses.field(default_factory=ServerConfig)
    execution: ExecutionConfig = dataclasses.field(default_factory=ExecutionConfig)
    screen: ScreenConfig = dataclasses.field(default_factory=ScreenConfig)
    devices: DeviceConfig = dataclasses.field(default_factory=DeviceConfig)
    robust: RobustConfig | None = None
    privacy: PrivacyConfig | None = None
    asynchronous: AsyncConfig | None = None

    def __post_init__(self) -> None:
        check_range(self, "seed", 0)
        check_range(self, "clients_per_round", 1)
        named = [n for n in ("robust", "privacy", "asynchronous") if getattr(self, n) is not None]
        check(
            self, "robust", len(named) < 2, "one of robust, privacy, asynchronous", f"Has {named}"
        )
        plain = self.server.name in OPTIMIZERS or not named
        check(self, "server", plain, f"one of {tuple(OPTIMIZERS)} with {named}")
        private = self.privacy is not None and self.privacy.mode == "central"
        exact = not private or self.devices.overcommit == 1
        check(self, "devices", exact, "overcommit 1 with central privacy", "Else q is not q")


def load_data(  # noqa: PLR0911
    config: DataConfig, seed: int, folder: Path | None
) -> FederatedData:
    """Load the samples; ``folder`` is the machine's data folder, or None.

    Raises:
        CapabilityError: the data set is not on this machine. DataError: it is damaged.
    """
    if config.name == "digits":
        return load_digits_data(seed, image=True)
    if config.path is not None:
        loaded = _OWN_LOADERS[config.name](Path(config.path), seed)
        if config.clients_csv is None:
            return loaded
        return with_clients(loaded, Path(config.clients_csv))
    if folder is None:
        raise CapabilityError(
            f"data set {config.name}", "there is no data folder on this machine",
            "Point RAYSYS_DATA at one, or use data.name=digits",
        )  # fmt: skip
    place = folder / FOLDERS[config.name]
    if config.name == "mnist":
        return load_mnist_data(place, seed, config.side)
    if config.name == "fashion-mnist":
        return load_fashion_data(place, seed, config.side, config.train)
    if config.name == "movielens":
        return load_movielens_data(place, seed)
    return load_shakespeare_data(place, seed)


def _load_parquet(path: Path, seed: int) -> FederatedData:
    return load_parquet_data(path, seed=seed)


_OWN_LOADERS: dict[str, Callable[[Path, int], FederatedData]] = {
    "npz": load_npz_data,
    "parquet": _load_parquet,
    "leaf": load_leaf_data,
    "cifar": load_cifar_data,
}


def make_population(config: FederatedConfig, data: FederatedData) -> Population:
    """Deal the samples to clients."""
    return partition(data.targets, config.partition, config.seed, data.keys)


def make_line(config: FederatedConfig, spec: ModelSpec) -> FedAvg:
    """The model line that the configuration names."""
    server, k = config.server, config.clients_per_round
    if config.robust is not None:
        return RobustAvg(spec, config.local, k, config.robust, server.optimizer())
    if config.privacy is not None:
        return PrivateAvg(spec, config.local, k, config.privacy, server.optimizer())
    if config.asynchronous is not None:
        return FedBuff(spec, config.local, k, config.asynchronous, server.optimizer())
    if server.name == "qfedavg":
        return QFedAvg(spec, config.local, k, server.q, server.optimizer())
    if server.name == "scaffold":
        return Scaffold(spec, config.local, k, server.optimizer())
    return FedAvg(spec, config.local, k, server.optimizer(), server.weighting)


def make_job(
    config: FederatedConfig,
    spec: ModelSpec,
    population: Population,
    strategy: Strategy | None = None,
) -> FederatedJob:
    """A fresh job; the same arguments always give the same job.

    Args:
        strategy: what to run instead of the configuration's own model line.
    """
    screen = config.screen
    if config.privacy is not None:
        multiplier = config.privacy.multiplier(config.clients_per_round / population.n_clients)
        screen = config.privacy.screen(screen, multiplier)
    return FederatedJob(
        strategy or make_line(config, spec),
        population,
        config.seed,
        config.execution,
        screen,
        config.devices,
    )
