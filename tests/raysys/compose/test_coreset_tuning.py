"""CCS inside LTE's tuning: what a block's score is, and that a tuning sees its part alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from raysys.compose import coreset_tuning
from raysys.compose.coreset_tuning import TuningConfig, subset, train_and_score, tune
from raysys.errors import ConfigError
from raysys.training.ccs.baselines import CCS
from raysys.training.lte.contest_config import ContestConfig
from raysys.training.lte.errors import LTEDataError
from raysys.training.lte.text import TokenBlocks

MODEL = ContestConfig(
    hidden=16, neurons=32, layers=1, heads=2, expert_size=8, length=8, batch=4, base_lr=5e-3,
    lr=1e-3, sparsity=0.5, held_out=4,
)  # fmt: skip
CONFIG = TuningConfig(model=MODEL, base_epochs=8)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def blocks() -> TokenBlocks:
    """The same eight letters in every block but each fourth, which is noise."""
    rng = np.random.default_rng(0)
    rows = np.tile(np.arange(97, 105), (32, 1))
    rows[::4] = rng.integers(0, 256, (8, 8))
    return TokenBlocks(rows.flatten(), 8)


def test_blocks_that_cannot_be_learned_score_as_the_hardest() -> None:
    train = blocks()
    scored = train_and_score(CONFIG, train, 0)
    aum = scored.table.score("aum")
    assert len(aum) == 32
    assert aum[::4].max() < np.delete(aum, slice(None, None, 4)).min()
    assert scored.recording_s > 0
    assert not any(".router." in name for name in scored.weights)
    # A cutoff of a quarter takes exactly the noise away.
    kept = CCS(beta=0.25).select(scored.table, 12, 0)
    assert not set(kept) & set(range(0, 32, 4))


def test_scoring_leaves_training_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    scored = train_and_score(CONFIG, blocks(), 0)

    def ignore(*_: object) -> None:
        return None

    with monkeypatch.context() as patch:
        patch.setattr(coreset_tuning._BlockRecorder, "note", ignore)
        patch.setattr(coreset_tuning._BlockRecorder, "table", ignore)
        plain = train_and_score(CONFIG, blocks(), 0)
    for name, tensor in scored.weights.items():
        assert torch.equal(tensor, plain.weights[name]), name


def test_a_tuning_sees_its_part_alone_and_lands_on_the_sparsity() -> None:
    train = blocks()
    scored = train_and_score(CONFIG, train, 0)
    part = subset(train, np.array([5, 1, 2, 9, 3, 6, 7, 10]))
    assert torch.equal(part.blocks[0], train.blocks[1])
    assert torch.equal(part.blocks[-1], train.blocks[10])
    found = tune(CONFIG, scored.weights, part, part, 6, 0)
    again = tune(CONFIG, scored.weights, part, part, 6, 0)
    assert (found.nll, found.sparsity) == (again.nll, again.sparsity)
    assert found.sparsity == pytest.approx(0.5, abs=0.15)
    assert found.steps == 6
    other = subset(train, np.array([5, 1, 2, 9, 3, 6, 7, 4]))
    assert tune(CONFIG, scored.weights, other, part, 6, 0).nll != found.nll


def test_bad_sizes_are_refused() -> None:
    train = blocks()
    with pytest.raises(ConfigError, match="multiple of the batch"):
        train_and_score(CONFIG, subset(train, np.arange(30)), 0)
    weights = train_and_score(dataclasses.replace(CONFIG, base_epochs=1), train, 0).weights
    with pytest.raises(LTEDataError, match="less than a batch"):
        tune(CONFIG, weights, subset(train, np.arange(3)), train, 4, 0)
    assert CONFIG.steps(1) == 2
    with pytest.raises(ConfigError, match="epochs"):
        TuningConfig(epochs=0)
