"""Callbacks for Lightning and Hugging Face's Trainer; importable without either.

``hf_callback`` and ``lightning_callback`` import their framework when called and return a callback
object of it. Both train with the model's own forward (see :mod:`raysys.training.kgt.watch`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from raysys.errors import CapabilityError
from raysys.training.kgt.config import KGTConfig
from raysys.training.kgt.controller import EventSink, ignore
from raysys.training.kgt.watch import WatchedKGT

STATE_FILE = "layer_freezing.pt"


def hf_callback(config: KGTConfig | None = None, log: EventSink = ignore) -> Any:
    """A ``transformers.TrainerCallback`` that freezes while the Trainer trains.

    Raises:
        CapabilityError: transformers is not installed.
    """
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise CapabilityError("transformers", str(error), "Install transformers") from error
    return _join(HFHooks, TrainerCallback)(config, log)


def lightning_callback(
    config: KGTConfig | None = None, log: EventSink = ignore, module: str = ""
) -> Any:
    """A Lightning ``Callback`` that freezes while the Trainer trains.

    Args:
        module: attribute of the LightningModule that holds the network, where ``training_step``
            calls that instead of the LightningModule itself.

    Raises:
        CapabilityError: neither ``lightning`` nor ``pytorch_lightning`` is installed.
    """
    base = _lightning_base()
    made = _join(LightningHooks, base)(config, log)
    made.module = module
    return made


def _lightning_base() -> type[Any]:
    import importlib

    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            base: type[Any] = importlib.import_module(name).Callback
        except ImportError:
            continue
        return base
    raise CapabilityError("Lightning", "no module named lightning", "Install lightning")


def _join(hooks: type[Any], base: type[Any]) -> type[Any]:
    return type("LayerFreezingCallback", (hooks, base), {})


class HFHooks:
    """What to do at the Trainer's events (the framework-free part)."""

    def __init__(self, config: KGTConfig | None = None, log: EventSink = ignore) -> None:
        self.config = config or KGTConfig()
        self.log = log
        self.watched: WatchedKGT | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Watch the model; go on from the checkpoint that the Trainer resumes."""
        saved = None
        path = self._path(args, state)
        if state.global_step and path.is_file():
            saved = torch.load(path, weights_only=True)
        self.watched = WatchedKGT(
            kwargs["model"],
            unwrapped(kwargs["optimizer"]),
            self.config,
            int(state.max_steps),
            state=saved,
            log=self.log,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One optimizer step is done."""
        if self.watched is not None:
            self.watched.step(epoch=int(state.epoch or 0))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the freezing state beside the Trainer's checkpoint."""
        found = self.watched.state_dict() if self.watched is not None else None
        if found is not None:
            path = self._path(args, state)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(found, path)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hooks off."""
        if self.watched is not None:
            self.watched.close()

    def _path(self, args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE


class LightningHooks:
    """What to do at Lightning's events (the framework-free part)."""

    def __init__(self, config: KGTConfig | None = None, log: EventSink = ignore) -> None:
        self.config = config or KGTConfig()
        self._sink = log  # Lightning puts a method of its own at `log`
        self.module = ""
        self.watched: WatchedKGT | None = None
        self._saved: Any = None
        self._steps = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Watch the network."""
        model = getattr(pl_module, self.module) if self.module else pl_module
        self._steps = int(trainer.global_step)
        self.watched = WatchedKGT(
            model,
            unwrapped(trainer.optimizers[0]),
            self.config,
            int(trainer.estimated_stepping_batches),
            state=self._saved,
            log=self._sink,
        )

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a step where the optimizer made one (gradient accumulation makes fewer)."""
        if self.watched is None or int(trainer.global_step) == self._steps:
            return
        self._steps = int(trainer.global_step)
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        self.watched.step(loss, epoch=int(trainer.current_epoch))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the hooks off."""
        if self.watched is not None:
            self.watched.close()

    def state_dict(self) -> dict[str, Any]:
        """Freezing state; Lightning puts it into its checkpoints."""
        return {"watched": self.watched.state_dict() if self.watched is not None else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember a checkpoint's state for the start of training."""
        self._saved = state_dict["watched"]


def unwrapped(optimizer: Any) -> Any:
    """The torch optimizer inside a framework's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
