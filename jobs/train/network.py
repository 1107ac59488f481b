"""The network of ``raysys train``, new or from an earlier run's checkpoint."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import nn

from jobs.train.config import NetworkConfig
from jobs.train.pretrained import load_classifier
from raysys.errors import ConfigError, DataError, StorageError
from raysys.training.datasets import Split
from raysys.training.kgt.models import ResNet, TextClassifier


def build(config: NetworkConfig, split: Split) -> nn.Module:
    """Make the network for these examples.

    Raises:
        ConfigError: the kind does not fit the examples.
        StorageError: the checkpoint to start from cannot be read.
        CapabilityError: Hugging Face's package is needed and not installed.
    """
    x, classes = split.train.x, split.train.classes
    text = x.ndim == 2
    kind = config.kind if config.kind != "auto" else ("transformer" if text else "resnet")
    if (kind != "resnet") != text:
        raise ConfigError("network.kind", kind, f"a network for inputs of shape {x.shape[1:]}")
    if kind == "huggingface":
        return load_classifier(config.init, classes)
    model: nn.Module
    if text:
        model = TextClassifier(
            classes,
            length=x.shape[1],
            width=config.width,
            blocks=config.blocks,
            dropout=config.dropout,
        )
    else:
        model = ResNet(
            classes,
            channels=x.shape[1],
            widths=config.widths,
            dimensions=x.ndim - 2,
            stem_stride=config.stem_stride,
        )
    if config.init:
        fine_tune_from(model, Path(config.init))
    return model


def fine_tune_from(model: nn.Module, path: Path) -> list[str]:
    """Load an earlier run's weights; returns the names that stay new (a head for other classes).

    Raises:
        StorageError: the file cannot be read.
        DataError: it holds none of this network's weights, or something that could run.
    """
    try:
        saved = torch.load(path, weights_only=True)  # a file from elsewhere must not run code
    except pickle.UnpicklingError as error:
        reason = "holds more than tensors and plain values"
        raise DataError(str(path), reason, "Save its weights alone") from error
    except OSError as error:
        raise StorageError(str(path), error.strerror or str(error), "Check network.init") from error
    weights = saved.get("model", saved)
    mine = model.state_dict()
    fitting = {k: v for k, v in weights.items() if k in mine and v.shape == mine[k].shape}
    if not fitting:
        raise DataError(str(path), "holds none of this network's weights", "Check network.*")
    model.load_state_dict(fitting, strict=False)
    return sorted(set(mine) - set(fitting))
