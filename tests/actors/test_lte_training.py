"""LTE on Ray: a worker killed in the middle resumes exactly; a sweep on actors; layers as tasks."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.lte.training import cluster_on_ray, fit, report_to_ray, run_worker, sweep
from actors.session import Session
from raysys.training.lte.config import ConvertConfig, StageConfig
from raysys.training.lte.conversion import cluster_all, convert
from raysys.training.lte.program import ProgramConfig, TextConfig, train


@pytest.fixture
def program(tmp_path: Path) -> ProgramConfig:
    import torch
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


@pytest.mark.filterwarnings("ignore")  # Ray's own deprecations
def test_a_killed_worker_resumes_exactly(
    ray_session: Session, program: ProgramConfig, tmp_path: Path
) -> None:
    def dying_worker(options: dict[str, Any]) -> None:
        """Kills its own process once, after the second state; local, so that Ray sends it by
        value.
        """
        marker = Path(options["config"]["out"] + ".died")

        def report(figures: dict[str, Any], state: bytes | None) -> None:
            report_to_ray(figures, state)
            if figures["step"] == 3 and not marker.exists():
                marker.write_text("")
                os.kill(os.getpid(), signal.SIGKILL)

        run_worker(options, report)

    expected = train(program, lambda *_: None)
    found = fit(program, str(tmp_path / "storage"), "stage", worker=dying_worker)
    assert (tmp_path / "out.died").exists()
    assert {key: found[key] for key in expected} == expected


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
