"""The stacked proxies and the framework callbacks, on digits and MNIST-1D."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from raysys.errors import CapabilityError, ConfigError
from raysys.training.ccs.accumulator import ScoreAccumulator
from raysys.training.ccs.callbacks import (
    LightningHooks,
    LoopRecorder,
    huggingface_callback,
    lightning_callback,
    logits_of,
)
from raysys.training.ccs.convergence import ScoringStopper
from raysys.training.ccs.dynamic_run import train_infobatch
from raysys.training.ccs.proxy import (
    ProxyConfig,
    StackedNet,
    accuracies,
    cosine_lr,
    score_run,
    train_stack,
)
from raysys.training.ccs.recorder import DynamicsRecorder
from raysys.training.datasets import LabelledArrays, digits, mnist1d

QUICK = ProxyConfig(channels=(4, 8, 8), iterations=60, score_iterations=60, batch=64)


def test_the_rate_falls_to_the_end_and_stays_there() -> None:
    """The released code steps its cosine past the end, where the rate climbs again."""
    rates = [cosine_lr(step, 100, 0.1, 1e-4) for step in range(150)]
    assert rates[0] == 0.1
    assert rates[99] == pytest.approx(1e-4)
    assert rates[100:] == [rates[99]] * 50
    assert (np.diff(rates[:100]) < 0).all()
    assert cosine_lr(0, 1, 0.1, 0.0) == 0.1


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 40), (12,)])
def test_a_stacked_model_equals_the_same_model_alone(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    pair = StackedNet(shape, 5, (4, 4, 8), [1, 2])
    alone = StackedNet(shape, 5, (4, 4, 8), [2])
    x = torch.randn(16, *shape)
    both = pair(x[:, None].expand(-1, 2, *shape))
    assert both.shape == (2, 16, 5)
    torch.testing.assert_close(both[1], alone(x[:, None])[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(both[0], both[1])


def test_a_model_learns_the_same_in_any_stack() -> None:
    train = digits().train
    rows = [np.arange(200), np.arange(200, 500)]
    few = ProxyConfig(channels=(4, 4, 4), iterations=5, batch=32)
    together = accuracies(train_stack(train, rows, [3, 4], few), train)
    alone = accuracies(train_stack(train, rows[1:], [4], few), train)
    assert together[1] == pytest.approx(alone[0], abs=0.01)


def test_scoring_digits_gives_six_scores_that_agree() -> None:
    split = digits()
    net, table = score_run(split.train, QUICK, seed=1)
    assert accuracies(net, split.test)[0] > 0.8
    wanted = {"aum", "el2n", "forgetting", "correctness", "entropy", "loss"}
    assert wanted <= set(table.scores)
    np.testing.assert_array_equal(table.ids, np.sort(split.train.ids))
    assert table.features is not None
    assert table.features.shape == (len(table), net.width)
    hard = table.hardness("aum")
    for name in ("el2n", "loss", "confidence"):
        assert np.corrcoef(hard, table.hardness(name))[0, 1] > 0.3
    again = score_run(split.train, QUICK, seed=1)[1]
    np.testing.assert_array_equal(again.score("aum"), table.score("aum"))


def test_scoring_ends_early_when_the_order_has_settled() -> None:
    train = digits().train
    stopper = ScoringStopper(threshold=0.5)
    steps: list[int] = []
    score_run(train, QUICK, seed=1, stopper=stopper, progress=steps.append)
    assert max(steps) < 60
    assert stopper.correlations[-1] > 0.5


def test_info_batch_saves_steps_at_the_same_accuracy() -> None:
    split = digits()
    config = dataclasses.replace(QUICK, iterations=220)
    net, steps = train_infobatch(split.train, config, seed=1)
    assert steps < 0.85 * 220
    whole = train_stack(split.train, [np.arange(len(split.train))], [1], config)
    assert accuracies(net, split.test)[0] > accuracies(whole, split.test)[0] - 0.03


def test_signals_learn_and_bad_subsets_are_refused() -> None:
    split = mnist1d(400, 100, seed=1)
    assert split.train.x.shape == (400, 1, 40)
    net = train_stack(split.train, [np.arange(400)], [0], QUICK)
    assert accuracies(net, split.train)[0] > 0.2
    with pytest.raises(ConfigError, match="none empty"):
        train_stack(split.train, [np.zeros(0, int)], [0], QUICK)
    with pytest.raises(ConfigError, match="shape"):
        StackedNet((1, 2, 3, 4), 2, (1, 1, 1), [0])


def test_a_last_batch_of_one_row_does_not_break_batch_norm() -> None:
    data = LabelledArrays(
        np.random.default_rng(0).normal(size=(65, 6)).astype(np.float32),
        np.arange(65) % 2, np.arange(65), 2,
    )  # fmt: skip
    table = score_run(data, ProxyConfig(channels=(4, 4, 4), score_iterations=2, batch=64))[1]
    assert len(table) == 65


class Scaled(nn.Module):
    """A model of the shape that the Hugging Face trainer expects."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, Any]:
        logits = self.linear(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def rows_of_data() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return [
        {"x": torch.randn(4), "labels": torch.tensor(i % 3), "sample_id": torch.tensor(i)}
        for i in range(12)
    ]


def test_plain_loop_hook_records_training_passes_only() -> None:
    model, store = Scaled(), ScoreAccumulator(np.arange(4))
    hook = LoopRecorder(model, DynamicsRecorder(store.add))
    x, labels = torch.randn(4, 4), torch.tensor([0, 1, 2, 0])
    hook.before(torch.arange(4), labels)
    model(x)
    model(x)  # not announced: not recorded
    model.eval()
    hook.before(torch.arange(4), labels)
    model(x)
    hook.close()
    hook.close()
    assert store.commit(0) == 4
    with pytest.raises(ConfigError, match="Return logits"):
        logits_of({"loss": 1})


def test_hugging_face_trainer_records_every_example(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    store = ScoreAccumulator(np.arange(12))
    callback = huggingface_callback(DynamicsRecorder(store.add), store.commit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own deprecations
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), num_train_epochs=2, per_device_train_batch_size=5,
            remove_unused_columns=False, report_to=[], save_strategy="no", use_cpu=True,
            disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model=Scaled(), args=arguments, train_dataset=rows_of_data(), callbacks=[callback]
        )
        trainer.train()
    assert store.committed_epoch == 1
    assert set(store.state_dict()["columns"]["visits"].tolist()) == {2}


def test_lightning_hooks_record_and_absence_is_a_capability_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = ScoreAccumulator(np.arange(4))
    hooks = LightningHooks(DynamicsRecorder(store.add), store.commit)

    class Loop:
        current_epoch = 0

    batch = (torch.arange(4), torch.randn(4, 4), torch.tensor([0, 1, 2, 0]))
    hooks.on_train_epoch_start(Loop(), None)
    hooks.on_train_batch_end(Loop(), None, {"loss": 0, "logits": torch.randn(4, 3)}, batch, 0)
    hooks.on_train_epoch_end(Loop(), None)
    assert store.committed_epoch == 0
    assert set(store.state_dict()["columns"]["visits"].tolist()) == {1}
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(CapabilityError, match="pip install lightning"):
        lightning_callback(DynamicsRecorder(store.add))
