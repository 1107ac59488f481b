"""``FiitedEmbeddingBag``: the store as a PyTorch layer, and ``convert`` for existing models.

The backward pass applies the fused update (optimizer and utility) to the store itself; there is no
sparse gradient tensor and the layer has no parameters. Adjustment runs once per training step, at
the next training forward or at an explicit :meth:`FiitedEmbeddingBag.end_step`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from raysys.errors import ConfigError
from raysys.training.fiited.batch_checks import split_offsets
from raysys.training.fiited.config import FiitedConfig, TableSpec
from raysys.training.fiited.store import FiitedStore

MODES = ("sum", "mean")
Ids = list[npt.NDArray[Any]] | npt.NDArray[Any]  # per table, or all tables' one after the other


class FiitedEmbeddingBag(nn.Module):
    """Pooled embeddings of one or several tables under a hard memory budget.

    Args:
        tables: the tables; one for a drop-in replacement of ``nn.EmbeddingBag``.
        config: budget, optimizer, cadence and the rest.
        mode: "sum" or "mean" over a bag.
        loss_reduction: "mean" if the loss is a mean over the batch (utilities are then scaled by
            the batch size, so that batch size does not change the ranking), "sum" if it is a sum.
        include_last_offset: whether offsets have B + 1 entries, as in ``nn.EmbeddingBag``.
        engine, dense: see :class:`FiitedStore`.

    Call with one table: ``bag(values [n], offsets [B], per_sample_weights [n])``, or 2-d values
    [B, L]. With several tables: lists of these, one entry per table; or 2-d values [B, T] with one
    id per table; or the layout of TorchRec and FBGEMM, all tables' values one after the other in
    one array with offsets [T * B] (plus one). Without offsets every id is a bag of its own.

    Returns:
        fp32 [B, sum of D_t], on the CPU.

    Raises:
        ConfigError: malformed ids, offsets, weights or gradient; the store has not changed.
    """

    def __init__(
        self,
        tables: Sequence[TableSpec],
        config: FiitedConfig,
        *,
        mode: str = "sum",
        loss_reduction: str = "mean",
        include_last_offset: bool = False,
        engine: str = "auto",
        dense: bool = False,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ConfigError("mode", mode, "one of 'sum' and 'mean'")
        if loss_reduction not in ("mean", "sum"):
            raise ConfigError("loss_reduction", loss_reduction, "'mean' or 'sum'")
        self.mode = mode
        self.loss_reduction = loss_reduction
        self.include_last_offset = include_last_offset
        self.lr = config.lr
        self.store = FiitedStore(config, tuple(tables), engine=engine, dense=dense)
        self._step = _Step()
        # Autograd calls backward only if an input wants a gradient: this scalar always does.
        self.anchor = torch.zeros((), requires_grad=True)

    def forward(self, values: Any, offsets: Any = None, per_sample_weights: Any = None) -> Tensor:
        ids, cuts, weights = self._split(values, offsets, per_sample_weights)
        if not (self.training and torch.is_grad_enabled()):
            return self._evaluate(ids, cuts, weights)
        if self._step.pending:
            self.end_step()
        if weights is None:
            return _apply(self, ids, cuts, None)
        return _apply(self, ids, cuts, torch.cat([w.to(torch.float32) for w in weights]))

    def end_step(self) -> None:
        """Count a step and let rows grow and shrink; implied by the next training forward."""
        self._step.pending = False
        self.store.end_step()

    def adjust(self) -> None:
        """One full adjustment round, now."""
        self.store.adjust()

    def stats(self) -> dict[str, float]:
        """Counters, bytes by part and both pruning ratios."""
        from raysys.training.fiited.metrics import statistics

        return statistics(self.store)

    def extra_repr(self) -> str:
        names = ", ".join(f"{t.name}: {t.dim}" for t in self.store.tables)
        return f"{names}; {self.store.slots} chunks of {self.store.config.chunk}, mode={self.mode}"

    def _evaluate(
        self,
        ids: Ids,
        cuts: list[npt.NDArray[Any]] | None,
        weights: list[Tensor] | None,
    ) -> Tensor:
        arrays = None if weights is None else [w.detach().numpy() for w in weights]
        mean = self.mode == "mean"
        out, _ = self.store.lookup(ids, _as_list(cuts), mean=mean, weights=_as_list(arrays))
        return torch.from_numpy(out)

    def _split(
        self, values: Any, offsets: Any, weights: Any
    ) -> tuple[Ids, list[npt.NDArray[Any]] | None, list[Tensor] | None]:
        count = len(self.store.tables)
        if weights is not None and self.mode != "sum":
            raise ConfigError("per_sample_weights", "given", 'mode="sum" only')
        if count > 1 and isinstance(values, Tensor | np.ndarray) and values.ndim == 1:
            if offsets is None and weights is None:
                return _numpy(values), None, None
            values, offsets, weights = self._by_table(values, offsets, weights)
        if isinstance(values, Tensor) and values.ndim == 2:
            if offsets is not None:
                raise ConfigError("offsets", "given", "no offsets with 2-d values")
            if count > 1 and values.shape[1] != count:
                raise ConfigError("values", tuple(values.shape), f"[batch, {count}]")
            if count == 1:
                rows, length = values.shape
                offsets = torch.arange(rows + self.include_last_offset) * length
                values = values.reshape(-1)
                weights = None if weights is None else weights.reshape(-1)
            else:
                values = list(values.unbind(1))
                weights = None if weights is None else list(weights.unbind(1))
        ids = [_numpy(v) for v in _listed(values)]
        cuts = None if offsets is None else [_numpy(o) for o in _listed(offsets)]
        if cuts is not None and not self.include_last_offset:
            cuts = _with_end(cuts, ids)
        return ids, cuts, None if weights is None else _listed(weights)

    def _by_table(self, values: Any, offsets: Any, weights: Any) -> tuple[Any, Any, Any]:
        """Values, offsets and weights of every table from arrays of all of them."""
        cuts = np.arange(len(values) + 1) if offsets is None else _numpy(offsets)
        if offsets is not None and not self.include_last_offset:
            cuts = np.append(cuts, len(values))
        bounds, parts = split_offsets(cuts, len(values), len(self.store.tables))
        if not self.include_last_offset:
            parts = [part[:-1] for part in parts]
        split = [
            None if a is None else [a[low:high] for low, high in bounds] for a in (values, weights)
        ]
        return split[0], None if offsets is None else parts, split[1]


class _Step:
    """Whether an update waits for its end of step. Not the module's own: to set that is slow."""

    __slots__ = ("pending",)

    def __init__(self) -> None:
        self.pending = False


def _apply(
    layer: FiitedEmbeddingBag,
    ids: Ids,
    cuts: list[npt.NDArray[Any]] | None,
    weights: Tensor | None,
) -> Tensor:
    function: Any = _Lookup.apply
    out: Tensor = function(layer.anchor, layer, ids, cuts, weights)
    return out


class _Lookup(torch.autograd.Function):
    """Lookup forward, fused update backward."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        layer: FiitedEmbeddingBag,
        ids: Ids,
        cuts: list[npt.NDArray[Any]] | None,
        weights: Tensor | None,
    ) -> Tensor:
        split = None
        if weights is not None:
            sizes = np.cumsum([len(table) for table in ids])[:-1]
            split = np.split(weights.detach().numpy(), sizes)
        mean = layer.mode == "mean"
        out, ctx.batch = layer.store.lookup(
            ids, _as_list(cuts), mean=mean, weights=_as_list(split), train=True
        )
        ctx.layer = layer
        ctx.inputs = (ids, cuts) if weights is not None and weights.requires_grad else None
        return torch.from_numpy(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layer: FiitedEmbeddingBag = ctx.layer
        grad = grads[0].to(torch.float32).contiguous().numpy()
        per_value = None if ctx.inputs is None else _weight_gradient(ctx, grad)
        scale = float(len(grad)) if layer.loss_reduction == "mean" else 1.0
        layer.store.update(ctx.batch, grad, lr=layer.lr, loss_scale=scale)
        layer._step.pending = True
        return None, None, None, None, per_value


def _weight_gradient(ctx: Any, grad: npt.NDArray[np.float32]) -> Tensor:
    """Gradient of per-sample weights: <output gradient of the bag, row>, before the update."""
    store: FiitedStore = ctx.layer.store
    parts = []
    for index, (table, ids) in enumerate(zip(store.tables, ctx.inputs[0])):
        vectors = store.export_dense(table.name, ids)
        cuts = ctx.inputs[1]
        bag = (
            np.arange(len(ids))
            if cuts is None
            else np.repeat(np.arange(len(cuts[index]) - 1), np.diff(cuts[index]))
        )
        low = int(store.columns[index])
        parts.append((vectors * grad[bag, low : low + table.dim]).sum(axis=1))
    return torch.from_numpy(np.concatenate(parts))


def convert(model: nn.Module, config: FiitedConfig, *, loss_reduction: str = "mean") -> nn.Module:
    """Replace every ``nn.EmbeddingBag`` and ``nn.Embedding`` of a model by a FIITED layer.

    Tables whose width is no multiple of ``config.chunk``, or with another use of their weight
    (max mode, padding index, tied weights are not detected), are refused rather than changed
    silently. Trained weights are not copied: rows start fresh.

    Returns:
        The same model object, changed in place. ``budget_ratio`` then applies per layer.

    Raises:
        ConfigError: a table cannot be converted; nothing has been changed.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Embedding | nn.EmbeddingBag)
    ]
    if not found:
        raise ConfigError("model", type(model).__name__, "a model with embedding tables")
    layers = [_converted(config, name, child, loss_reduction) for _, name, child in found]
    for (parent, name, _), layer in zip(found, layers):
        setattr(parent, name, layer)
    return model


def _converted(
    config: FiitedConfig, name: str, child: nn.Embedding | nn.EmbeddingBag, reduction: str
) -> FiitedEmbeddingBag:
    mode = child.mode if isinstance(child, nn.EmbeddingBag) else "sum"
    if mode not in MODES:
        raise ConfigError(f"{name}.mode", mode, "'sum' or 'mean'")
    if child.padding_idx is not None or child.max_norm is not None:
        raise ConfigError(name, "padding_idx or max_norm", "a plain table")
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    spec = TableSpec(name=name, dim=child.embedding_dim, rows=child.num_embeddings)
    own = replace(config, seed=config.seed + seed)
    kind = FiitedEmbedding if isinstance(child, nn.Embedding) else FiitedEmbeddingBag
    return kind([spec], own, mode=mode, loss_reduction=reduction)


class FiitedEmbedding(FiitedEmbeddingBag):
    """Drop-in for ``nn.Embedding``: ids of any shape give vectors of shape [..., D]."""

    def forward(self, values: Any, offsets: Any = None, per_sample_weights: Any = None) -> Tensor:
        if offsets is not None or per_sample_weights is not None:
            raise ConfigError("offsets", "given", "ids only")
        flat = super().forward(values.reshape(-1))
        return flat.reshape(*values.shape, flat.shape[-1])


def hash_strings(values: Sequence[str]) -> npt.NDArray[np.int64]:
    """Stable non-negative 63-bit ids of strings (BLAKE2b), for categorical text columns."""
    digests = [hashlib.blake2b(v.encode(), digest_size=8).digest() for v in values]
    joined = np.frombuffer(b"".join(digests), "<u8")
    return (joined >> np.uint64(1)).astype(np.int64)


def _numpy(values: Any) -> npt.NDArray[Any]:
    if isinstance(values, Tensor):
        if values.device.type != "cpu":
            raise ConfigError("values", str(values.device), "tensors on the CPU")
        return values.detach().numpy()
    return np.asarray(values)


def _listed(values: Any) -> list[Any]:
    return list(values) if isinstance(values, list | tuple) else [values]


def _as_list(values: Sequence[Any] | None) -> list[Any] | None:
    return None if values is None else list(values)


def _with_end(cuts: list[Any], ids: list[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    """``nn.EmbeddingBag`` leaves the end of the last bag out of its offsets: add it."""
    if len(cuts) != len(ids):
        raise ConfigError("offsets", len(cuts), f"offsets for {len(ids)} tables")
    return [np.append(cut, len(i)) if cut.ndim == 1 else cut for cut, i in zip(cuts, ids)]
