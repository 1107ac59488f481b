"""``raysys train``: digits, Parquet and image folders, resume after SIGKILL, data parallel."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from actors.session import Session
from jobs.launcher import main
from jobs.train import data, network, pretrained
from jobs.train import run as train_run
from jobs.train.__main__ import JOB
from jobs.train.config import DataConfig, NetworkConfig, TrainConfig
from jobs.train.run import STATE_FILE, from_bytes
from raysys.errors import ConfigError, DataError, StorageError
from raysys.runs import RunDirectory
from raysys.training.kgt import EventLog, NoFreezing

SMALL = [
    "recipe.epochs=3", "recipe.batch_size=128", "recipe.lr=0.02", "network.widths=[4,4,8]",
    "kgt.window=2", "kgt.every=1", "kgt.bootstrap_rate=10", "kgt.reference=fp32", "kgt.coef=5",
    "kgt.modules=4", "data.train_rows=1024",
]  # fmt: skip


def run(folder: Path, *settings: str) -> int:
    pairs = [item for setting in (*SMALL, *settings) for item in ("--set", setting)]
    return main(JOB, ["--run-dir", str(folder), *pairs])


def test_digits_freeze_with_a_cache_and_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"kgt.cache.directory={tmp_path / 'cache'}", "recipe.lr=0.1", "recipe.epochs=6"]
    assert run(tmp_path / "run", *settings) == 0
    result = RunDirectory.open(str(tmp_path / "run")).read_json("result.json")
    assert result["steps"] == 48
    assert result["accuracy"] > 0.3
    assert max(result["frozen_share_per_module"]) > 0
    assert result["skipped_readings"] == 0
    assert "module  0" in capsys.readouterr().out
    assert (tmp_path / "run" / "freezing.svg").read_text().startswith("<?xml")


def test_dry_run_prints_modules_and_interval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "run", "dry_run=true") == 0
    out = capsys.readouterr().out
    assert "head, never frozen" in out
    assert "every n = 1 steps, window W = 2" in out


@pytest.mark.parametrize("method", ["vanilla", "linear", "static", "gradient"])
def test_baselines_run(tmp_path: Path, method: str) -> None:
    extra = ["recipe.epochs=2", "freeze_start=0.3", "gradient_interval=4", "freeze_level=0.5"]
    assert run(tmp_path / "run", f"method={method}", *extra) == 0
    result = RunDirectory.open(str(tmp_path / "run")).read_json("result.json")
    frozen = max(result["frozen_share_per_module"])
    assert frozen == 0 if method == "vanilla" else frozen >= 0


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = RunDirectory.open(str(folder)).load_checkpoint()
    assert found is not None
    loaded: dict[str, torch.Tensor] = from_bytes(found[1][STATE_FILE])["model"]
    return loaded


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    # One grouping for both runs: measured costs would differ between processes.
    settings = ["kgt.pattern=stem|blocks[.].|head", "kgt.modules=64", "recipe.epochs=12"]
    assert run(tmp_path / "whole", *settings) == 0
    pairs = [x for setting in (*SMALL, *settings) for x in ("--set", setting)]
    command = [sys.executable, "-m", "jobs.train", "--run-dir", str(tmp_path / "part"), *pairs]
    child = subprocess.Popen(
        [*command, "--set", "checkpoint_every=5"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 120
    while not list((tmp_path / "part" / "checkpoints").glob("0*")) and child.poll() is None:
        assert time.monotonic() < end
    child.send_signal(signal.SIGKILL)
    assert child.wait() in (-signal.SIGKILL, 0)
    assert main(JOB, ["--run-dir", str(tmp_path / "part"), "--resume"]) == 0
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "part")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_fine_tuning_a_transformer_on_parquet_text(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"text": "".join(rng.choice(list("abc" if label else "xyz"), 24)), "label": label}
        for label in rng.integers(0, 2, 160).tolist()
    ]
    path = tmp_path / "text.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    text = [
        "data.source=parquet", f"data.path={path}", "data.text_length=24", "network.width=16",
        "network.blocks=2", "recipe.batch_size=32", "recipe.optimizer=adamw", "recipe.lr=0.003",
    ]  # fmt: skip
    assert run(tmp_path / "first", *text) == 0
    found = RunDirectory.open(str(tmp_path / "first")).load_checkpoint()
    assert found is not None
    init = tmp_path / "init.pt"
    init.write_bytes(found[1][STATE_FILE])
    assert run(tmp_path / "second", *text, f"network.init={init}", "recipe.epochs=1") == 0
    result = RunDirectory.open(str(tmp_path / "second")).read_json("result.json")
    assert result["accuracy"] > 0.9


@pytest.mark.filterwarnings("ignore")
def test_fine_tuning_a_hugging_face_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    folder = tmp_path / "encoder"
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    small = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=16,
    )  # fmt: skip
    transformers.BertModel(small).save_pretrained(folder)
    labels = np.random.default_rng(0).integers(0, 2, 160).tolist()
    rows = [{"text": f"a {'good' if label else 'bad'} film", "label": label} for label in labels]
    path = tmp_path / "text.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    settings = [
        "data.source=parquet", f"data.path={path}", "data.text_length=8", "recipe.batch_size=16",
        f"data.tokenizer={folder}", "network.kind=huggingface", f"network.init={folder}",
        "recipe.optimizer=adamw", "recipe.lr=0.01", "recipe.epochs=12", "recipe.schedule=constant",
        "kgt.min_bootstrap_share=0.5",
    ]  # fmt: skip
    assert run(tmp_path / "run", *settings) == 0
    result = RunDirectory.open(str(tmp_path / "run")).read_json("result.json")
    assert result["accuracy"] > 0.9
    assert max(result["frozen_share_per_module"]) > 0
    tuned = pretrained.load_classifier(str(tmp_path / "run" / "model"), 2)
    last = weights(tmp_path / "run")
    assert all(torch.equal(last[name], value) for name, value in tuned.state_dict().items())
    with pytest.raises(StorageError, match="is no folder"):
        pretrained.load_classifier(str(tmp_path / "none"), 2)
    with pytest.raises(StorageError, match="model and tokenizer"):
        pretrained.load_classifier(str(tmp_path / "run"), 2)
    with pytest.raises(ConfigError, match=r"network\.init"):
        NetworkConfig(kind="huggingface")


def test_image_folders(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for label in ("dark", "light"):
        (tmp_path / label).mkdir()
        for index in range(6):
            level = rng.integers(0, 80) + (150 if label == "light" else 0)
            pixels = np.full((10, 12, 3), level, np.uint8)
            Image.fromarray(pixels).save(tmp_path / label / f"{index}.png")
    config = DataConfig(source="folder", path=str(tmp_path), image_size=8)
    split = data.load(config, 0)
    assert split.train.x.shape[1:] == (3, 8, 8)
    assert len(split.train) + len(split.test) == 12
    assert abs(float(np.concatenate([split.train.x, split.test.x]).mean())) < 1e-3
    (tmp_path / "dark" / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="not an image"):
        data.load(config, 0)


def test_bad_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="does not exist"):
        data.load(DataConfig(source="folder", path=str(tmp_path / "none")), 0)
    with pytest.raises(DataError, match="holds no images"):
        data.load(DataConfig(source="folder", path=str(tmp_path)), 0)
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"label": [1]}), path)
    with pytest.raises(DataError, match="`image` or `text`"):
        data.load(DataConfig(source="parquet", path=str(path)), 0)
    path.write_bytes(b"no parquet")
    with pytest.raises(DataError, match="not a Parquet file"):
        data.load(DataConfig(source="parquet", path=str(path)), 0)
    with pytest.raises(ConfigError, match="path"):
        DataConfig(source="parquet")


def test_network_and_data_must_fit(tmp_path: Path) -> None:
    split = data.load(DataConfig(source="digits"), 0)
    with pytest.raises(ConfigError, match=r"network\.kind"):
        network.build(NetworkConfig(kind="transformer"), split)
    with pytest.raises(StorageError):
        network.build(NetworkConfig(init=str(tmp_path / "none.pt"), widths=(4,)), split)
    with pytest.raises(ConfigError, match="control"):
        TrainConfig(workers=2, control="actors")


def test_controller_actors_keep_state_and_events_in_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def start(*arguments: Any, **options: Any) -> Any:
        given.update(options)
        return NoFreezing()

    monkeypatch.setattr(train_run, "start_remote_control", start)
    config = TrainConfig(control="actors", network=NetworkConfig(widths=(4, 4)))
    split = data.load(DataConfig(), 0)
    train_run.make_loop(config, split, folder=str(tmp_path)).close()
    assert Path(given["state_path"]).parent == tmp_path
    apart = EventLog(Path(given["log_path"]))
    log = EventLog()
    log({"event": "applied", "step": 7, "upto": 1})
    apart({"event": "guided", "step": 2})
    apart({"event": "freeze", "step": 6, "upto": 1})
    rows = train_run.all_events(log, str(tmp_path))
    assert [row["event"] for row in rows] == ["guided", "freeze", "applied"]
    assert train_run.all_events(log, "") == log.rows


def test_two_workers_switch_together_and_reduce_fewer_bytes(
    ray_session: Session, tmp_path: Path
) -> None:
    from jobs.train.parallel import train_parallel
    from raysys.config import config_from_dict

    values: dict[str, Any] = {
        "workers": 2,
        "exchange_every": 2,
        "data": {"train_rows": 1024},
        "recipe": {"epochs": 4, "batch_size": 64, "lr": 0.02, "schedule": "constant"},
        "network": {"widths": [4, 4, 8]},
        "kgt": {
            "window": 2, "every": 1, "bootstrap_rate": 10, "reference": "fp32", "coef": 5.0,
            "cache": {"directory": str(tmp_path / "cache")},
        },
    }  # fmt: skip
    config = config_from_dict(TrainConfig, values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray Train's use of Ray Data's deprecated options
        metrics = train_parallel(config, str(tmp_path / "store"), "two")
    assert metrics["step"] == 32
    assert metrics["frozen"] > 0
    assert all((step % 2) == 0 for step, _ in metrics["applied"])
    whole = sum(
        p.numel() * 4 for p in network.build(config.network, data.load(config.data, 0)).parameters()
    )
    assert 0 < metrics["reduced_bytes_per_step"] < whole
    assert metrics["ranks_agree"]


class Hostile:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("should-not-exist"),)


def test_a_checkpoint_from_elsewhere_cannot_run_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    split = data.load(DataConfig(), 0)
    torch.save({"model": {"x": Hostile()}}, tmp_path / "evil.pt")
    with pytest.raises(DataError, match="tensors and plain values"):
        network.build(NetworkConfig(init="evil.pt", widths=(4,)), split)
    assert not Path("should-not-exist").exists()
