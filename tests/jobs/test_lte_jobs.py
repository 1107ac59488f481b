"""``raysys lte``: a tiny model through convert, train, eval, inspect, sweep, bench and undo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.session import Session
from jobs import launcher
from jobs.bench.inputs import write_language_model
from jobs.lte.__main__ import command_line as lte

TEXT = ["text.corpus=folder", "text.tokens=bytes", "text.seq_len=16", "text.held_out=4"]
STAGE = ["stage.steps=4", "stage.batch=2"]


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    write_language_model(tmp_path / "dense", tmp_path / "text")
    return tmp_path / "dense"


def call(command: str, run: Path, *fields: str) -> dict[str, Any]:
    flags = [part for field in fields for part in ("--set", field)]
    assert lte([command, "--run-dir", str(run), *flags]) == 0
    found: dict[str, Any] = json.loads((run / "result.json").read_text())
    return found


@pytest.mark.filterwarnings("ignore")  # Ray Train's own deprecations
def test_a_model_from_conversion_to_its_figures(
    dense: Path,
    tmp_path: Path,
    ray_session: Session,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(launcher.JobContext, "ray", lambda self, **changes: ray_session)
    start, trained, again = tmp_path / "lte-0", tmp_path / "lte-1", tmp_path / "again"
    text = [*TEXT, f"text.folder={tmp_path / 'text'}"]
    fields = [f"model={dense}", f"out={start}", "options.expert_size=8"]
    assert call("convert", tmp_path / "convert", *fields)["layers"] == 2
    stage = [f"model={start}", f"out={trained}", *text, *STAGE]
    result = call("train", tmp_path / "train", *stage)
    assert 0.0 <= result["sparsity"] <= 1.0
    assert "step 4 of 4: training loss" in capsys.readouterr().err
    assert call("inspect", tmp_path / "inspect", f"model={trained}")["stage"] == 1
    seen = call("eval", tmp_path / "eval", f"model={trained}", *text, "offsets=[0.0, 9.0]",
                "decode_tokens=4", "rivals=[keep_largest, cats]",
                "rival_sparsities=[0.5]")  # fmt: skip
    whole, usual, high = seen["rows"]
    assert whole["sparsity"] == 0.0
    assert high["sparsity"] == 1.0
    assert usual["nll"] == pytest.approx(result["nll"], rel=1e-5)
    assert usual["gflops"] <= whole["gflops"]
    assert [row["method"] for row in seen["rivals"]] == ["keep_largest", "cats"]
    assert all(0.3 < row["sparsity"] < 0.7 for row in seen["rivals"])
    assert seen["decoding"]["speedup"] > 0.0
    assert (tmp_path / "eval" / "report.html").stat().st_size > 1000
    swept = call("sweep", tmp_path / "sweep", f"model={start}", f"out={tmp_path / 'etas'}", *text,
                 *STAGE, "stage2_steps=2", "etas=[0.01]")["rows"]  # fmt: skip
    assert [row["eta"] for row in swept] == [0.01]
    assert lte(["convert", "--run-dir", str(tmp_path / "undo"), "--set", f"model={start}",
                "--set", f"out={again}", "--set", "undo=true"]) == 0  # fmt: skip
    from transformers import AutoModelForCausalLM

    ids = torch.arange(1, 9)[None]
    logits = [AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (dense, again)]
    assert float((logits[0] - logits[1]).abs().max()) < 1e-5


def test_the_kernel_is_timed_on_this_machine(tmp_path: Path) -> None:
    found = call("bench", tmp_path / "run", "hidden=32", "neurons=64", "batches=[1]",
                 "sparsities=[0.0, 0.5]", "repeats=1", "dtype=float32")  # fmt: skip
    assert len(found["rows"]) == 2


@pytest.mark.parametrize(
    ("command", "field", "words"),
    [
        ("eval", "model=x decode_tokens=1", "decode_tokens"),
        ("eval", "model=x rivals=[magic]", "rivals"),
        ("inspect", "full=true", "model"),
        ("sweep", "etas=[]", "etas"),
        ("serve", "levels=[[0,0.0]]", "model"),
    ],
)
def test_a_bad_field_is_named(
    command: str, field: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [part for one in field.split() for part in ("--set", one)]
    assert lte([command, "--run-dir", str(tmp_path / "run"), *flags]) == 2
    assert words in capsys.readouterr().err


def test_a_dense_model_is_not_served_as_lte(dense: Path, tmp_path: Path) -> None:
    assert lte(["serve", "--run-dir", str(tmp_path / "run"), "--set", f"model={dense}"]) == 6
