"""LTE on Ray: a worker killed in the middle resumes exactly; a sweep on actors; layers as tasks."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from actors.lte.progress import RowLog, following, rows_of
from actors.lte.training import cluster_on_ray, fit, log_path, report_to_ray, run_worker, sweep
from actors.session import Session
from raysys.training.lte.config import ConvertConfig, StageConfig
from raysys.training.lte.conversion import cluster_all, convert
from raysys.training.lte.program import ProgramConfig, TextConfig, train


@pytest.fixture
def program(tmp_path: Path) -> ProgramConfig:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, tie_word_embeddings=True)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "lte", ConvertConfig(expert_size=8))
    for index in range(20):
        (tmp_path / f"{index}.txt").write_text(f"the {index} quick brown foxes " * 12)
    text = TextConfig(corpus="folder", folder=str(tmp_path), tokens="bytes", seq_len=16, held_out=4)
    return ProgramConfig(model=str(tmp_path / "lte"), out=str(tmp_path / "out"), text=text,
                         stage=StageConfig(steps=6, batch=4), checkpoint_every=2)  # fmt: skip


def dying(step: int) -> Callable[[dict[str, Any]], None]:
    """A worker that kills its own process once, after the state of a step; local, so that Ray
    sends it by value.
    """

    def worker(options: dict[str, Any]) -> None:
        marker = Path(options["config"]["out"] + ".died")

        def report(figures: dict[str, Any], state: bytes | None) -> None:
            report_to_ray(figures, state)
            if figures["step"] == step and state is not None and not marker.exists():
                marker.write_text("")
                os.kill(os.getpid(), signal.SIGKILL)

        run_worker(options, report)

    return worker


@pytest.mark.filterwarnings("ignore")  # Ray's own deprecations
def test_a_killed_worker_resumes_exactly(
    ray_session: Session, program: ProgramConfig, tmp_path: Path
) -> None:
    expected = train(program, lambda *_: None)
    found = fit(program, str(tmp_path / "storage"), "stage", worker=dying(3))
    assert (tmp_path / "out.died").exists()
    assert {key: found[key] for key in expected} == expected
    rows = rows_of(log_path(str(tmp_path / "storage"), "stage"))
    assert [row["step"] for row in rows] == list(range(6))  # none lost, none twice


def test_rows_are_followed_and_a_resumed_run_takes_back_what_it_repeats(tmp_path: Path) -> None:
    path, seen = tmp_path / "run" / "steps.jsonl", list[dict[str, Any]]()
    with following(path, seen.append):
        log = RowLog(path)
        log({"step": 0, "perplexity": 9.0, "sparsity_per_layer": [0.5]})
        for step in range(3):
            log({"step": step, "loss": 1.0})
        with path.open("a") as file:
            file.write('{"step": 3, "lo')  # killed while it wrote
        log = RowLog(path, step=2)
        log({"step": 2, "loss": 2.0})
    assert rows_of(path)[-2:] == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]
    assert len(rows_of(path)) == 4
    assert seen[0] == {"step": 0, "perplexity": 9.0}
    assert seen[-1] == {"step": 2, "loss": 2.0}


@pytest.mark.filterwarnings("ignore")  # Ray's own deprecations
def test_two_workers_that_share_the_weights_train_as_one_also_after_a_kill(
    ray_session: Session, program: ProgramConfig, tmp_path: Path
) -> None:
    """FSDP2 under Ray Train; the sums of two workers are rounded in another order."""
    stage = dataclasses.replace(program.stage, target_sparsity=0.5, steps=4)
    program = dataclasses.replace(program, stage=stage)
    expected = train(program, lambda *_: None)
    sharded = dataclasses.replace(program, shard=True, out=str(tmp_path / "sharded"))
    found = fit(sharded, str(tmp_path / "storage"), "sharded", workers=2, worker=dying(1))
    assert (tmp_path / "sharded.died").exists()
    assert found["nll"] == pytest.approx(expected["nll"], abs=1e-4)
    alone, both = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "sharded"))
    assert both.keys() == alone.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(both[name], tensor, rtol=0, atol=1e-4)


def test_a_sweep_trains_one_model_per_eta_and_layers_cluster_as_tasks(
    ray_session: Session, program: ProgramConfig, tmp_path: Path
) -> None:
    rows = sweep(program, [0.01, 50.0], tmp_path / "sweep", stage2_steps=2)
    assert [row["eta"] for row in rows] == [0.01, 50.0]
    assert rows[1]["sparsity"] > rows[0]["sparsity"]
    assert (tmp_path / "sweep" / "eta-50" / "stage2" / "config.json").is_file()
    assert not any(row["stopped"] for row in rows)
    features = [
        np.random.default_rng(i).standard_normal((16, 4)).astype(np.float32) for i in (0, 1)
    ]
    options = ConvertConfig(expert_size=4)
    for mine, theirs in zip(cluster_on_ray(features, options), cluster_all(features, options)):
        assert np.array_equal(mine.labels, theirs.labels)
