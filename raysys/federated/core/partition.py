"""How samples are dealt to clients: IID, Dirichlet, label shards, natural keys, planted groups.

All splits are drawn from the keyed stream of :mod:`randomness`, so a seed gives the same split
everywhere. Each sample goes to exactly one client.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from raysys.config import check, check_choice, check_range
from raysys.errors import ConfigError, InfeasibleError
from raysys.federated.core.population import Population, population_from_lists
from raysys.federated.core.randomness import Purpose, generator

IntArray = npt.NDArray[np.int64]
SCHEMES = ("iid", "dirichlet", "shards", "natural", "planted")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PartitionConfig:
    """Which split to make.

    Args:
        scheme: "iid", "dirichlet", "shards" (a fixed number of classes per client), "natural" (the
            data set's own client keys) or "planted" (client c has classes ``groups[c % G]`` only).
        clients: number of clients; the natural scheme takes it from the keys.
        alpha: concentration of the Dirichlet scheme; smaller is more skewed.
        classes_per_client: classes of each client in the shard scheme.
        groups: sets of classes of the planted scheme; samples of other classes are left out.
    """

    scheme: str = "dirichlet"
    clients: int = 100
    alpha: float = 0.3
    classes_per_client: int = 2
    groups: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        check_choice(self, "scheme", SCHEMES)
        check_range(self, "clients", 1)
        check_range(self, "alpha", 0, low_open=True)
        check_range(self, "classes_per_client", 1)
        planted = self.scheme == "planted"
        check(self, "groups", planted == bool(self.groups), "sets of classes, for planted only")
        check(self, "groups", len(self.groups) <= self.clients, "no more than clients")


def partition(
    labels: npt.NDArray[Any], config: PartitionConfig, seed: int, keys: npt.ArrayLike | None = None
) -> Population:
    """Split samples by ``config``.

    Args:
        labels: int labels [N]; the IID and natural schemes use only its length.
        keys: client key of each sample [N], needed by the natural scheme.

    Raises:
        ConfigError: the natural scheme without keys. InfeasibleError: fewer samples than clients.
    """
    if config.scheme == "natural":
        if keys is None:
            raise ConfigError(
                "partition.scheme",
                "natural",
                "a scheme that the data set supports",
                "This data set has no client keys: use iid, dirichlet or shards",
            )
        return natural(keys)
    if config.scheme == "iid":
        return iid(len(labels), config.clients, seed)
    if config.scheme == "dirichlet":
        return dirichlet(labels, config.clients, config.alpha, seed)
    if config.scheme == "planted":
        sets = [list(group) for group in config.groups]
        return planted_groups(labels, config.clients, sets, seed)[0]
    return label_shards(labels, config.clients, config.classes_per_client, seed)


def iid(n_samples: int, clients: int, seed: int) -> Population:
    """Deal shuffled samples so that client sizes differ by at most one."""
    _check_enough(n_samples, clients)
    order = generator(seed, Purpose.PARTITION).permutation(n_samples)
    return population_from_lists(np.array_split(order, clients))


def dirichlet(labels: npt.NDArray[Any], clients: int, alpha: float, seed: int) -> Population:
    """Clients of equal size whose class mix is drawn from a symmetric Dirichlet(alpha).

    Each client draws a class mix; its samples are then taken class by class without replacement.
    Where a class runs out the rest is filled from the classes that are left, so that all samples
    are dealt and all sizes differ by at most one (as in the protocol of Hsu et al. 2019).
    """
    _check_enough(len(labels), clients)
    rng = generator(seed, Purpose.PARTITION)
    classes, codes = np.unique(labels, return_inverse=True)
    pools = [rng.permutation(np.flatnonzero(codes == c)) for c in range(len(classes))]
    left = np.array([len(pool) for pool in pools])
    sizes = [len(part) for part in np.array_split(np.arange(len(labels)), clients)]
    mixes = rng.dirichlet(np.full(len(classes), alpha), size=clients)
    groups: list[IntArray] = []
    for size, mix in zip(sizes, mixes):
        taken: list[IntArray] = []
        missing = size
        while missing:
            open_mix = np.where(left > 0, mix + 1e-12, 0.0)
            wanted = np.minimum(rng.multinomial(missing, open_mix / open_mix.sum()), left)
            drawn = np.flatnonzero(wanted)
            taken += [pools[c][left[c] - wanted[c] : left[c]] for c in drawn]
            left -= wanted
            missing -= int(wanted.sum())
        groups.append(np.concatenate(taken))
    return population_from_lists(groups)


def label_shards(
    labels: npt.NDArray[Any], clients: int, classes_per_client: int, seed: int
) -> Population:
    """Give every client samples of ``classes_per_client`` classes, each class used equally often.

    Raises:
        InfeasibleError: a class has fewer samples than clients that need it, or there are fewer
            classes than a client shall have.
    """
    _check_enough(len(labels), clients)
    rng = generator(seed, Purpose.PARTITION)
    classes, codes = np.unique(labels, return_inverse=True)
    if classes_per_client > len(classes):
        raise InfeasibleError(
            f"{classes_per_client} classes per client",
            f"the data has {len(classes)} classes",
            "Lower partition.classes_per_client",
        )
    owners = _balanced_classes(len(classes), clients, classes_per_client, rng)
    groups: list[list[IntArray]] = [[] for _ in range(clients)]
    for c in range(len(classes)):
        users = np.flatnonzero(owners[:, c])
        rows = rng.permutation(np.flatnonzero(codes == c))
        if len(rows) < len(users):
            raise InfeasibleError(
                f"{clients} clients with {classes_per_client} classes each",
                f"class {classes[c]!r} has {len(rows)} samples for {len(users)} clients",
                "Lower partition.clients",
            )
        for user, part in zip(users, np.array_split(rows, max(len(users), 1))):
            groups[user].append(part)
    return population_from_lists([np.concatenate(parts) for parts in groups])


def natural(keys: npt.ArrayLike) -> Population:
    """One client per distinct key (speaker, user, writer), in sorted order of the keys."""
    array = np.asarray(keys)
    if array.ndim != 1 or array.size == 0:
        raise ConfigError("keys", array.shape, "one client key per sample")
    _, codes = np.unique(array, return_inverse=True)
    order = np.argsort(codes, kind="stable")
    offsets = np.concatenate(([0], np.cumsum(np.bincount(codes))))
    return Population(offsets=offsets, sample_ids=order.astype(np.int32))


def planted_groups(
    labels: npt.NDArray[Any], clients: int, class_sets: list[list[int]], seed: int
) -> tuple[Population, IntArray]:
    """Clients in known groups, each group owning a set of classes; returns the groups too.

    Client c belongs to group ``c % len(class_sets)``. Samples of classes in no set are left out.

    Raises:
        ConfigError: two groups claim one class. InfeasibleError: a group has too few samples.
    """
    flat = [label for group in class_sets for label in group]
    if len(set(flat)) != len(flat):
        raise ConfigError("class_sets", class_sets, "each class in one group only")
    rng = generator(seed, Purpose.PARTITION)
    membership = np.arange(clients, dtype=np.int64) % len(class_sets)
    groups: list[IntArray] = [np.empty(0, dtype=np.int64)] * clients
    for number, wanted in enumerate(class_sets):
        members = np.flatnonzero(membership == number)
        rows = rng.permutation(np.flatnonzero(np.isin(labels, wanted)))
        _check_enough(len(rows), len(members))
        for member, part in zip(members, np.array_split(rows, max(len(members), 1))):
            groups[member] = part
    return population_from_lists(groups), membership


def _balanced_classes(
    n_classes: int, clients: int, per_client: int, rng: np.random.Generator
) -> npt.NDArray[np.bool_]:
    """Bool [clients, classes]: each client gets its number, class use differs by at most one."""
    owners = np.zeros((clients, n_classes), dtype=bool)
    used = np.zeros(n_classes, dtype=np.int64)
    for client in rng.permutation(clients):
        rarest = np.lexsort((rng.random(n_classes), used))[:per_client]
        owners[client, rarest] = True
        used[rarest] += 1
    return owners


def _check_enough(n_samples: int, clients: int) -> None:
    if n_samples < clients:
        raise InfeasibleError(
            f"{clients} clients",
            f"there are only {n_samples} samples to deal",
            "Lower partition.clients",
        )
