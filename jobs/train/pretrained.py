"""Fine-tuning a Hugging Face encoder from a local folder: tokens in, logits out, a folder again.

Nothing is downloaded. The package is imported when a function is called, so that training without
it works; its models are not traced, so their frozen part has no activation cache.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from raysys import scratch
from raysys.errors import CapabilityError, ConfigError, StorageError


class PretrainedClassifier(nn.Module):
    """A sequence classifier over padded token ids (N, T); returns logits (N, classes).

    Args:
        pad: token id that is padding; it is masked.
    """

    def __init__(self, net: nn.Module, pad: int) -> None:
        super().__init__()
        self.net = net
        self.pad = pad

    def forward(self, ids: Tensor) -> Tensor:
        """Map token ids to logits."""
        logits: Tensor = self.net(input_ids=ids, attention_mask=(ids != self.pad).long()).logits
        return logits


def load_classifier(folder: str, classes: int) -> PretrainedClassifier:
    """The pretrained encoder with a head for ``classes``; a head of another size is new.

    Raises:
        CapabilityError: transformers is not installed.
        StorageError: the folder holds no model.
    """
    transformers = _transformers()
    with _described(folder), contextlib.redirect_stderr(io.StringIO()):
        net = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=classes, local_files_only=True, ignore_mismatched_sizes=True
        )
    pad = net.config.pad_token_id
    if pad is None:
        raise ConfigError("network.init", folder, "a model with a padding token")
    return PretrainedClassifier(net, int(pad))


def tokens(folder: str, texts: Sequence[Any], length: int) -> NDArray[np.int64]:
    """Token ids by the tokenizer in ``folder``, cut or padded to ``length``.

    Raises:
        CapabilityError: transformers is not installed.
        StorageError: the folder holds no tokenizer.
        ConfigError: a text is no string.
    """
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise ConfigError(f"text in row {row}", text, "a string", "Remove rows without text")
    transformers = _transformers()
    with _described(folder):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    found = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length)
    return np.asarray(found["input_ids"], np.int64)


def exported(model: nn.Module) -> dict[str, bytes]:
    """Files of a fine-tuned model, as ``from_pretrained`` reads them; none for other networks."""
    if not isinstance(model, PretrainedClassifier):
        return {}
    net: Any = model.net
    with scratch.folder("train") as folder, contextlib.redirect_stderr(io.StringIO()):
        net.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise CapabilityError("transformers", str(error), "pip install transformers") from error
    return transformers


@contextlib.contextmanager
def _described(folder: str) -> Iterator[None]:
    """Say which folder is unusable, and why."""
    if not Path(folder).is_dir():
        raise StorageError(folder, "is no folder", "Give a model folder that is on this machine")
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).split("\n", maxsplit=1)[0]
        raise StorageError(folder, reason, "Give a folder with model and tokenizer") from error
