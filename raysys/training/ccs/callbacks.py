"""Recording inside other people's training loops: plain PyTorch, Lightning, HF Trainer.

Importable without Lightning and transformers: each factory imports its library when called.
All it takes is an id per example in the batch and the logits that training computes anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from raysys.errors import CapabilityError, ConfigError
from raysys.training.ccs.recorder import DynamicsRecorder

EpochEnd = Callable[[int], object]
ID_KEY = "sample_id"


class LoopRecorder:
    """For a plain loop: records each training forward pass of a model through a hook.

    Call ``before(ids, labels)`` ahead of the forward pass; evaluation passes are ignored. Without a
    hook, calling ``DynamicsRecorder.record`` after the forward pass does the same.
    """

    def __init__(self, model: nn.Module, recorder: DynamicsRecorder) -> None:
        self._recorder = recorder
        self._next: tuple[Any, torch.Tensor] | None = None
        self._handle = model.register_forward_hook(self._after)

    def before(self, ids: Any, labels: torch.Tensor) -> None:
        """Name the examples of the next forward pass."""
        self._next = (ids, labels)

    def _after(self, model: nn.Module, inputs: Any, output: Any) -> None:
        if not model.training or self._next is None:
            return
        (ids, labels), self._next = self._next, None
        self._recorder.record(ids, logits_of(output), labels)

    def close(self) -> None:
        """Remove the hook and hand over what is pending; may be called twice."""
        self._handle.remove()
        self._recorder.flush()


def logits_of(output: Any) -> torch.Tensor:
    """Find the logits in a model's output: the tensor itself, ``.logits``, or ``["logits"]``.

    Raises:
        ConfigError: there are none.
    """
    if isinstance(output, torch.Tensor):
        return output
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, dict):
        found = output.get("logits")
    if not isinstance(found, torch.Tensor):
        remedy = "Return logits from the model, or from training_step as {'loss', 'logits'}"
        raise ConfigError("output", type(output).__name__, "logits", remedy)
    return found


class TrainerHooks:
    """What a Hugging Face ``Trainer`` calls; :func:`huggingface_callback` makes it a callback.

    The data set yields ``sample_id`` beside its columns (``remove_unused_columns=False``); a
    forward pre-hook takes it out before the model sees it.
    """

    def __init__(self, recorder: DynamicsRecorder, epoch_end: EpochEnd | None = None) -> None:
        self._recorder = recorder
        self._epoch_end = epoch_end
        self._handles: list[Any] = []
        self._current: tuple[Any, torch.Tensor] | None = None
        self._epoch = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
        ]

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._epoch = round(state.epoch or 0)
        self._recorder.start_epoch(self._epoch)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._recorder.flush()
        if self._epoch_end:
            self._epoch_end(self._epoch)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._recorder.flush()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        ids = kwargs.pop(ID_KEY, None)
        self._current = None
        if model.training:
            if ids is None:
                remedy = "Add it to the data set and set remove_unused_columns=False"
                raise ConfigError(ID_KEY, None, "a column with each example's id", remedy)
            self._current = (ids, kwargs["labels"])
        return args, kwargs

    def _after(self, model: nn.Module, inputs: Any, output: Any) -> None:
        if self._current is not None:
            (ids, labels), self._current = self._current, None
            self._recorder.record(ids, logits_of(output), labels)


def huggingface_callback(recorder: DynamicsRecorder, epoch_end: EpochEnd | None = None) -> Any:
    """A ``transformers.TrainerCallback`` that records.

    Args:
        epoch_end: called with the epoch after its last batch, for example
            ``ScoreAccumulator.commit``.

    Raises:
        CapabilityError: transformers is not installed.
    """
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise CapabilityError("transformers", str(error), "pip install transformers") from None
    callback = type("DynamicsCallback", (TrainerHooks, TrainerCallback), {})
    return callback(recorder, epoch_end)


class LightningHooks:
    """What a Lightning ``Trainer`` calls; :func:`lightning_callback` makes it a callback.

    ``training_step`` returns ``{"loss": ..., "logits": ...}``; ``unpack`` finds ids and labels in a
    batch, by default the first and the last of a tuple, as :class:`WithIndex` yields.
    """

    def __init__(
        self,
        recorder: DynamicsRecorder,
        epoch_end: EpochEnd | None = None,
        unpack: Callable[[Any], tuple[Any, torch.Tensor]] | None = None,
    ) -> None:
        self._recorder = recorder
        self._epoch_end = epoch_end
        self._unpack = unpack or (lambda batch: (batch[0], batch[-1]))

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._recorder.start_epoch(trainer.current_epoch)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        ids, labels = self._unpack(batch)
        self._recorder.record(ids, logits_of(outputs), labels)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._recorder.flush()
        if self._epoch_end:
            self._epoch_end(trainer.current_epoch)


def lightning_callback(
    recorder: DynamicsRecorder,
    epoch_end: EpochEnd | None = None,
    unpack: Callable[[Any], tuple[Any, torch.Tensor]] | None = None,
) -> Any:
    """A Lightning callback that records (``lightning`` or ``pytorch_lightning``).

    Raises:
        CapabilityError: neither is installed.
    """
    import importlib

    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        callback = type("DynamicsCallback", (LightningHooks, module.Callback), {})
        return callback(recorder, epoch_end, unpack)
    raise CapabilityError("Lightning", "it is not installed", "pip install lightning")
