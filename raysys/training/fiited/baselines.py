"""Embeddings that FIITED is compared with, each as one layer with the same optimizer.

Full width, uniform narrow width, hashing trick and quotient-remainder are dense stores (the same
compiled update); whole-row pruning is a store with one chunk per row, which is the row-level rule
of AdaEmbed; frequency-only chunks differ in their utility alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from raysys.errors import ConfigError
from raysys.training.fiited.bag import FiitedEmbeddingBag
from raysys.training.fiited.config import FiitedConfig, TableSpec
from raysys.training.fiited.metrics import mapped_bytes
from raysys.training.fiited.store import FiitedStore

METHODS = ("full", "chunks", "rows", "frequency", "uniform", "hashing", "quotient_remainder")


class Embedding(nn.Module):
    """One method: ids [B, F] to vectors [B, F * width]; ``width`` may be narrower than D."""

    def __init__(self, layers: Sequence[FiitedEmbeddingBag], width: int, rule: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.width = width
        self.rule = rule

    def forward(self, ids: Tensor) -> Tensor:
        if self.rule == "plain":
            out: Tensor = self.layers[0](ids)
            return out
        sizes = torch.tensor([table.rows for table in self.bag(0).store.tables])
        if self.rule == "hash":
            mixed = (ids * 0x9E3779B1 + 0x7F4A7C15) & 0x7FFFFFFFFFFF
            return self.layers[0]((mixed >> 7) % sizes)  # type: ignore[no-any-return]
        remainder = self.layers[0](ids % sizes)
        return remainder * self.layers[1](ids // sizes)  # type: ignore[no-any-return]

    def end_step(self) -> None:
        """Finish a training step on every layer."""
        for index in range(len(self.layers)):
            self.bag(index).end_step()

    def bytes(self) -> int:
        """Resident bytes, index and buffers included; a dense table counts without the rounding
        to pages that this implementation happens to do."""
        return sum(_bytes(self.bag(i).store) for i in range(len(self.layers)))

    def bag(self, index: int) -> FiitedEmbeddingBag:
        """One of the layers, typed."""
        layer = self.layers[index]
        assert isinstance(layer, FiitedEmbeddingBag)
        return layer


def _bytes(store: FiitedStore) -> int:
    if not store.dense:
        return mapped_bytes(store)
    config = store.config
    rowwise = 4 if config.optimizer == "rowwise_adagrad" else 0
    rows = sum(table.rows * (table.dim * config.weight_bytes + rowwise) for table in store.tables)
    return rows + int(store.engine.counters()["scratch_bytes"])


def build(
    method: str, rows: Sequence[int], dim: int, ratio: float, config: FiitedConfig
) -> Embedding:
    """A method at a pruning ratio: the share of ``sum(rows) * dim`` weights that it gives up.

    Raises:
        ConfigError: unknown method, or a ratio that the method cannot reach.
    """
    if method not in METHODS:
        raise ConfigError("method", method, "one of " + ", ".join(METHODS))
    keep = 1 - ratio
    pruned = replace(config, budget_ratio=ratio, budget_slots=None, budget_bytes=None)
    full = replace(config, budget_ratio=0.0, budget_slots=None, budget_bytes=None)
    if method in ("chunks", "rows", "frequency"):
        if method == "rows":
            pruned = replace(pruned, chunk=dim, utility="grad")
        elif method == "frequency":
            pruned = replace(pruned, utility="freq")
        return Embedding([_bag(rows, dim, pruned, False)], dim, "plain")
    if method == "full":
        return Embedding([_bag(rows, dim, full, True)], dim, "plain")
    if method == "uniform":
        width = max(4, round(dim * keep / 4) * 4)
        narrow = replace(full, chunk=4, init_scale=config.init_scale * (width / dim) ** 0.5)
        return Embedding([_bag(rows, width, narrow, True)], width, "plain")
    if method == "hashing":
        kept = [max(1, int(n * keep)) for n in rows]
        return Embedding([_bag(kept, dim, full, True)], dim, "hash")
    return _quotient_remainder(rows, dim, keep, full)


def _quotient_remainder(
    rows: Sequence[int], dim: int, keep: float, full: FiitedConfig
) -> Embedding:
    """Shi et al. 2020, multiplied: m remainders and ceil(n / m) quotients, m + n/m = keep * n."""
    remainders = []
    for n in rows:
        kept = max(2 * n**0.5, keep * n)
        remainders.append(max(1, int((kept + max(kept * kept - 4 * n, 0) ** 0.5) / 2)))
    quotients = [-(-n // m) for n, m in zip(rows, remainders)]
    # A product starts near the remainder's vector: the quotient's table starts at one.
    ones = replace(full, init="constant", init_scale=1.0)
    layers = [_bag(remainders, dim, full, True), _bag(quotients, dim, ones, True)]
    return Embedding(layers, dim, "quotient")


def _bag(rows: Sequence[int], dim: int, config: FiitedConfig, dense: bool) -> FiitedEmbeddingBag:
    tables = [TableSpec(name=f"field{i}", dim=dim, rows=n) for i, n in enumerate(rows)]
    return FiitedEmbeddingBag(tables, config, dense=dense)


def to_tensor(ids: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Tensor:
    """Ids as a tensor without a copy."""
    return torch.from_numpy(np.ascontiguousarray(ids))
