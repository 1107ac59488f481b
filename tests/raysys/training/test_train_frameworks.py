"""The callbacks inside the frameworks themselves: Lightning and Hugging Face's Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from raysys.training.ccs import DynamicsRecorder, ScoreAccumulator
from raysys.training.ccs.callbacks import lightning_callback as recording_callback
from raysys.training.kgt import EventLog, KGTConfig
from raysys.training.kgt.callbacks import hf_callback, lightning_callback

# Both frameworks warn about things that are not ours.
pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = 64
EAGER = KGTConfig(
    window=2, every=2, bootstrap_window=2, bootstrap_rate=10.0, min_bootstrap_share=0,
    reference="fp32", coef=50.0,
)  # fmt: skip


def visits(store: ScoreAccumulator) -> list[int]:
    count: list[int] = store.state_dict()["columns"]["visits"].tolist()
    return count


def lightning_module(pl: Any) -> Any:
    class Net(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(torch.relu(self.b(torch.relu(self.a(x)))))
            return out

        def training_step(self, batch: Any, index: int) -> dict[str, Tensor]:
            _, x, y = batch
            logits = self(x)
            return {"loss": functional.cross_entropy(logits, y), "logits": logits}

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)

    return Net()


def lightning_fit(pl: Any, folder: Path, model: Any, callbacks: list[Any], **fit: Any) -> Any:
    trainer = pl.Trainer(
        max_epochs=fit.pop("epochs"), accelerator="cpu", devices=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        default_root_dir=folder, callbacks=callbacks,
    )  # fmt: skip
    torch.manual_seed(1)
    x, y = torch.randn(ROWS, 4), torch.randint(0, 2, (ROWS,))
    trainer.fit(model, DataLoader(TensorDataset(torch.arange(ROWS), x, y), batch_size=16), **fit)
    return trainer


def test_lightning_freezes_records_and_resumes(tmp_path: Path) -> None:
    pl = pytest.importorskip("pytorch_lightning", reason="Lightning is not installed")
    log, store = EventLog(), ScoreAccumulator(np.arange(ROWS))
    freezing = lightning_callback(EAGER, log)
    recording = recording_callback(DynamicsRecorder(store.add), store.commit)
    model = lightning_module(pl)
    trainer = lightning_fit(pl, tmp_path, model, [freezing, recording], epochs=12)
    assert not model.a.weight.requires_grad
    assert {"guided", "reading", "applied"} <= {row["event"] for row in log.rows}
    assert visits(store) == [12] * ROWS
    path = str(tmp_path / "whole.ckpt")
    trainer.save_checkpoint(path)
    again, callback = lightning_module(pl), lightning_callback(EAGER)
    fit = {"epochs": 13, "ckpt_path": path, "weights_only": False}
    lightning_fit(pl, tmp_path, again, [callback], **fit)
    assert not again.a.weight.requires_grad
    assert torch.equal(again.a.weight, model.a.weight)
    assert not torch.equal(again.head.weight, model.head.weight)


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Token sequences whose first token is the class."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.tokens = torch.from_numpy(rng.integers(2, 20, (ROWS, 6)))
        self.labels = torch.from_numpy(rng.integers(0, 2, ROWS))
        self.tokens[:, 0] = self.labels

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[row], "labels": self.labels[row]}


def bert(transformers: Any) -> Any:
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=8, num_labels=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config)


def hf_fit(folder: Path, model: Any, callback: Any, **options: Any) -> Any:
    import transformers

    resume = options.pop("resume", None)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=16, report_to=[], use_cpu=True,
        disable_tqdm=True, remove_unused_columns=False, logging_strategy="no", seed=0,
        lr_scheduler_type="constant", **options,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=Rows(), callbacks=[callback]
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_hugging_face_trainer_freezes_and_resumes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    log = EventLog()
    model = bert(transformers)
    options = {"num_train_epochs": 10, "save_steps": 40, "save_strategy": "steps"}
    hf_fit(tmp_path, model, hf_callback(EAGER, log), **options)
    applied = [row for row in log.rows if row["event"] == "applied"]
    assert applied
    frozen = [name for name, value in model.named_parameters() if not value.requires_grad]
    assert any("embeddings" in name for name in frozen)
    assert all(value.requires_grad for value in model.classifier.parameters())
    again = bert(transformers)
    options["num_train_epochs"] = 11
    callback = hf_callback(EAGER)
    hf_fit(tmp_path, again, callback, resume=str(tmp_path / "checkpoint-40"), **options)
    still = [name for name, value in again.named_parameters() if not value.requires_grad]
    assert set(frozen) <= set(still)
