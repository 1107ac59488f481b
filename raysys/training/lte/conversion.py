"""Turn a dense model into an LTE model, and back (sections 4.1 and 4.2).

Clustering permutes neurons physically, so the function of the model does not change: expert i
is the neurons ``[i E, (i + 1) E)`` afterwards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from raysys.training.lte.adapters import FFN, find_ffns
from raysys.training.lte.checkpoint import (
    Checkpoint,
    LTEInfo,
    digest,
    load,
    load_dense,
    save,
    write_folder,
)
from raysys.training.lte.config import ConvertConfig
from raysys.training.lte.errors import LTEConfigError
from raysys.training.lte.gating import SparseModel
from raysys.training.lte.grouping import Floats, Groups, expert_count, group

# Groups every layer: (features of each layer, config) -> groups. Ray runs one task per layer.
Clusterer = Callable[[Sequence[Floats], ConvertConfig], Sequence[Groups]]


def cluster_all(features: Sequence[Floats], config: ConvertConfig) -> list[Groups]:
    """Cluster the layers one after the other."""
    return [group(x, config.expert_size, config.grouping, config.seed) for x in features]


def features_of(ffn: FFN) -> Floats:
    """What neurons are grouped by: rows of the gate, or of the only input projection."""
    rows: Floats = ffn.rows(0).detach().float().numpy()
    return np.ascontiguousarray(rows)


def convert_model(
    model: nn.Module,
    config: ConvertConfig,
    *,
    features: Sequence[Floats] | None = None,
    cluster: Clusterer = cluster_all,
    folder: Path = Path(),
) -> Checkpoint:
    """Convert a live dense model in place.

    Args:
        model: a Hugging Face model of a supported architecture.
        config: options.
        features: one matrix per layer to cluster instead of the input weights; needed by
            ``grouping="coactivation"``.
        cluster: how the layers are clustered.
        folder: where it came from, for its tokenizer.

    Raises:
        LTEConfigError: unsupported architecture, sizes that do not divide, or no features.
        LTEDataError: weights that are not finite.
    """
    ffns = find_ffns(model)
    for ffn in ffns:
        expert_count(ffn.neurons, config.expert_size)
        if hasattr(ffn.entry, "router"):
            raise LTEConfigError("model", ffn.path, "a dense model", "It is an LTE model already")
    if config.grouping == "coactivation" and features is None:
        remedy = "See raysys.training.lte.conversion.coactivations"
        raise LTEConfigError("grouping", config.grouping, "activations of sample text", remedy)
    base = digest(model)
    given = list(features) if features is not None else [features_of(ffn) for ffn in ffns]
    permutations = []
    for ffn, groups in zip(ffns, cluster(given, config), strict=True):
        permutation = torch.from_numpy(groups.permutation)
        ffn.permute(permutation)
        permutations.append(permutation)
    info = LTEInfo(
        expert_size=config.expert_size,
        threshold=config.threshold,
        router_bias=config.router_bias,
        grouping=config.grouping,
        base_architecture=type(model).__name__,
        base_sha256=base,
    )
    return Checkpoint(SparseModel(model, config), permutations, info, folder)


def convert(
    source: Path, target: Path, config: ConvertConfig, *, cluster: Clusterer = cluster_all
) -> Checkpoint:
    """Convert a model folder.

    Raises:
        StorageError, LTEConfigError, LTEDataError: see :func:`convert_model`.
    """
    checkpoint = convert_model(load_dense(source), config, cluster=cluster, folder=source)
    save(checkpoint, target)
    return checkpoint


@torch.no_grad()
def restore(checkpoint: Checkpoint) -> nn.Module:
    """Undo the conversion of a live model: neurons in their original order, no routers.

    The weights keep what training changed; right after a conversion they are bit for bit the old.
    """
    checkpoint.sparse.close()
    for gate, permutation in zip(checkpoint.sparse.gates, checkpoint.permutations, strict=True):
        gate.ffn.permute(torch.argsort(permutation.long()))
        del gate.ffn.entry.router
    return checkpoint.sparse.model


def undo(source: Path, target: Path) -> None:
    """Write the dense model of an LTE checkpoint.

    Raises:
        StorageError, LTECheckpointError: the checkpoint cannot be read or the folder not written.
    """
    checkpoint = load(source)
    name = checkpoint.info.base_architecture
    model = restore(checkpoint)
    changes = {"architectures": [name], "lte": None}
    write_folder(model, target, extra={}, changes=changes, tokenizer_from=source)


@torch.no_grad()
def coactivations(model: nn.Module, inputs: Sequence[dict[str, torch.Tensor]]) -> list[Floats]:
    """|Activations| of every neuron over sample tokens, float32 [f, tokens], one per layer."""
    ffns = find_ffns(model)
    seen: list[list[torch.Tensor]] = [[] for _ in ffns]
    hooks = [
        ffn.output.register_forward_pre_hook(
            lambda _module, args, kept=kept: kept.append(args[0].flatten(0, -2).abs().float())
        )
        for ffn, kept in zip(ffns, seen)
    ]
    try:
        for each in inputs:
            model(**each)
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(kept).T.contiguous().numpy() for kept in seen]


def with_training(checkpoint: Checkpoint, **changes: object) -> Checkpoint:
    """The same checkpoint with other facts, such as its stage and sparsity."""
    info = dataclasses.replace(checkpoint.info, **changes)  # type: ignore[arg-type]
    return Checkpoint(checkpoint.sparse, checkpoint.permutations, info, checkpoint.folder)
