"""Callbacks: importable without the frameworks, and driven through their events."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from raysys.errors import CapabilityError
from raysys.training.kgt import KGTConfig, callbacks
from raysys.training.kgt.callbacks import HFHooks, LightningHooks

QUICK = KGTConfig(
    window=2, every=2, bootstrap_window=2, bootstrap_rate=10.0, min_bootstrap_share=0,
    reference="fp32", coef=50.0,
)  # fmt: skip


class Network(nn.Module):
    """Two hidden layers; returns a loss as a Hugging Face model does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(torch.relu(self.b(torch.relu(self.a(x)))))
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def train(model: Network, hooks: Any, state: Any, args: Any, steps: int, start: int = 0) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    x, y = torch.randn(16, 4), torch.randint(0, 2, (16,))
    state.global_step = start
    hooks.on_train_begin(args, state, None, model=model, optimizer=optimizer)
    for step in range(start, start + steps):
        model.train()
        torch.autograd.backward(model(x=x, labels=y)["loss"])
        optimizer.step()
        state.global_step, state.epoch = step + 1, 0.0
        hooks.on_step_end(args, state, None)
        optimizer.zero_grad()


def test_hugging_face_events_freeze_save_and_resume(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, hooks = Network(), HFHooks(QUICK)
    state = SimpleNamespace(global_step=0, max_steps=200, epoch=0.0)
    args = SimpleNamespace(output_dir=str(tmp_path))
    train(model, hooks, state, args, 60)
    assert not model.a.weight.requires_grad
    hooks.on_save(args, state, None)
    hooks.on_train_end(args, state, None)
    assert not model._forward_pre_hooks
    again, resumed = Network(), HFHooks(QUICK)
    train(again, resumed, state, args, 1, start=60)
    assert not again.a.weight.requires_grad
    assert resumed.watched is not None
    assert resumed.watched.kgt is not None
    assert resumed.watched.kgt.steps == 60  # 59 before: the first step built the session


def test_lightning_events_count_optimizer_steps() -> None:
    torch.manual_seed(0)
    model, hooks = Network(), LightningHooks(QUICK)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    trainer = SimpleNamespace(
        global_step=0, optimizers=[optimizer], estimated_stepping_batches=200, current_epoch=0
    )
    x, y = torch.randn(16, 4), torch.randint(0, 2, (16,))
    hooks.on_train_start(trainer, model)
    for batch in range(120):
        loss = model(x, y)["loss"]
        torch.autograd.backward(loss)
        if batch % 2:
            optimizer.step()
            optimizer.zero_grad()
            trainer.global_step += 1
        hooks.on_train_batch_end(trainer, model, {"loss": loss.detach()}, None, batch)
    assert hooks.watched is not None
    assert hooks.watched.kgt is not None
    assert hooks.watched.kgt.steps == 59  # the first step built the session
    assert not model.a.weight.requires_grad
    saved = hooks.state_dict()
    hooks.on_train_end(trainer, model)
    other, fresh = Network(), LightningHooks(QUICK)
    trainer.optimizers = [torch.optim.SGD(other.parameters(), 0.01)]
    fresh.load_state_dict(saved)
    fresh.on_train_start(trainer, other)
    assert not other.a.weight.requires_grad


def test_without_lightning_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(CapabilityError, match="Install lightning"):
        callbacks.lightning_callback()


def test_with_lightning_the_callback_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Callback:
        pass

    package = SimpleNamespace(pytorch=SimpleNamespace(Callback=Callback))
    monkeypatch.setitem(sys.modules, "lightning", package)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", package.pytorch)
    made = callbacks.lightning_callback(QUICK, module="net")
    assert isinstance(made, Callback)
    assert made.module == "net"


def test_importing_the_package_loads_no_framework() -> None:
    code = (
        "import sys, raysys.training.kgt.callbacks; "
        "print(sorted({'transformers', 'lightning', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
