"""The contest of LTE and its rivals: a run that is stopped anywhere goes on to the same figures."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raysys.errors import DataError
from raysys.training.lte.contest import Contest
from raysys.training.lte.contest_config import ContestConfig
from raysys.training.lte.contest_states import States
from raysys.training.lte.text import TokenBlocks

CONFIG = ContestConfig(hidden=16, neurons=32, layers=2, heads=2, expert_size=4, length=16, batch=4,
                       base_steps=7, steps=10, sparsity=0.5, held_out=8)  # fmt: skip
BYTES = np.random.default_rng(0).integers(97, 110, 16 * 320)


class StoppedError(Exception):
    """Stands for a process that is killed."""


def stop_at(step: int) -> Any:
    count = itertools.count(1)

    def on_step(_: dict[str, Any]) -> None:
        if next(count) == step:
            raise StoppedError

    return on_step


@pytest.mark.parametrize("method", ["lte", "noisy_top_k", "wanda"])
def test_a_stopped_method_goes_on_to_the_same_row(method: str, tmp_path: Path) -> None:
    blocks = TokenBlocks(BYTES, CONFIG.length)
    base = Contest.train_base(CONFIG, blocks)
    whole = Contest(CONFIG, blocks, blocks, base, 0).run(method)
    with pytest.raises(StoppedError):
        Contest.train_base(CONFIG, blocks, on_step=stop_at(5), states=States(tmp_path, 2))
    again = Contest.train_base(CONFIG, blocks, states=States(tmp_path, 2))
    assert all(torch.equal(again[name], base[name]) for name in base)
    for step in (4, 6):  # the second stop is in LTE's second stage
        states = States(tmp_path / "seed", 2)
        with pytest.raises(StoppedError):
            Contest(CONFIG, blocks, blocks, base, 0, stop_at(step), states).run(method)
    seen: list[dict[str, Any]] = []
    states = States(tmp_path / "seed", 2)
    assert Contest(CONFIG, blocks, blocks, base, 0, seen.append, states).run(method) == whole
    assert len(seen) < 5  # of ten: the rest was not trained again
    kept = sorted(path.name for path in (tmp_path / "seed").iterdir())
    assert kept == (["tuned-silu.pt"] if method == "wanda" else [])


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    (tmp_path / "lte-1.pt").write_bytes(b"no state")
    with pytest.raises(DataError, match=r"lte-1\.pt"):
        States(tmp_path).load("lte-1")
