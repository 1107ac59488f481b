"""Data-parallel training over gloo without Ray: two forked ranks on one machine."""

from __future__ import annotations

import json
import os
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from jobs.train import data, network
from jobs.train.config import TrainConfig
from jobs.train.parallel import train_rank
from jobs.train.run import from_bytes
from raysys.config import config_from_dict


def rank_process(config: TrainConfig, rank: int, folder: Path, saved: Any) -> int:
    """Fork a rank; it writes its metrics (and rank 0 its checkpoints) into the folder."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        store = f"file://{folder / 'store'}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)

        def report(metrics: dict[str, Any], content: bytes | None) -> None:
            with (folder / f"metrics-{rank}").open("a") as file:
                file.write(json.dumps(metrics) + "\n")
            if content is not None:
                (folder / f"state-{metrics['step']}").write_bytes(content)

        train_rank(config, rank, 2, saved, report)
        status = 0
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
    os._exit(status)


def train_two(config: TrainConfig, folder: Path, saved: Any = None) -> list[list[dict[str, Any]]]:
    """Run both ranks to the end; returns the metrics of each."""
    folder.mkdir()
    children = [rank_process(config, rank, folder, saved) for rank in (0, 1)]
    codes = [os.waitpid(child, 0)[1] for child in children]
    errors = [path.read_text() for path in folder.glob("error-*")]
    assert codes == [0, 0], errors
    files = [folder / f"metrics-{rank}" for rank in (0, 1)]
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def test_ranks_switch_together_reduce_fewer_bytes_and_resume(tmp_path: Path) -> None:
    torch.set_num_threads(1)
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
    zero, one = train_two(config, tmp_path / "first")
    assert [row["step"] for row in zero] == [8, 16, 24, 32]
    assert zero[-1]["frozen"] > 0
    assert [row["applied"] for row in zero] == [row["applied"] for row in one]
    assert all(step % 2 == 0 for step, _ in zero[-1]["applied"])
    assert all(row["ranks_agree"] for row in (*zero, *one))
    model = network.build(config.network, data.load(config.data, 0))
    whole = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert zero[0]["reduced_bytes_per_step"] == whole
    assert zero[-1]["reduced_bytes_per_step"] < whole
    assert zero[-1]["cache_hit_rate"] > 0
    saved = from_bytes((tmp_path / "first" / "state-24").read_bytes())
    again, _ = train_two(config, tmp_path / "second", saved)
    assert [row["step"] for row in again] == [32]
    assert again[-1]["frozen"] >= zero[2]["frozen"] > 0
    assert again[-1]["ranks_agree"]
