"""The planted stream repeats itself, knows its values, and every method trains on it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raysys.errors import ConfigError
from raysys.training.fiited import FiitedConfig
from raysys.training.fiited.baselines import METHODS, build
from raysys.training.fiited.models import DLRM
from raysys.training.fiited.progressive import run
from raysys.training.fiited.stream import PlantedStream, StreamConfig

SMALL = StreamConfig(rows=(300, 200), batch=64, steps=12, swap_at=6, signal=2.0)


def test_two_streams_of_one_seed_are_equal_and_drift_changes_popularity() -> None:
    one, other = PlantedStream(SMALL), PlantedStream(SMALL)
    before = one.popularity(0)
    for a, b in zip(one, other):
        assert np.array_equal(a.ids, b.ids)
        assert np.array_equal(a.labels, b.labels)
    assert not np.array_equal(one.popularity(0), before)
    assert one.popularity(0).sum() == pytest.approx(1.0)


def test_dummies_are_worth_nothing() -> None:
    stream = PlantedStream(SMALL)
    values = stream.values(0, 5000)
    assert (values[stream.classes[0] == 0] == 0).all()
    assert values[stream.classes[0] == 3].sum() > 0


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method: str) -> None:
    torch.manual_seed(0)
    embedding = build(method, SMALL.rows, 16, 0.5, FiitedConfig(chunk=4, budget_ratio=0.5))
    record = run(PlantedStream(SMALL), embedding, DLRM(2, embedding.width))
    assert 0 < record.auc() < 1
    assert np.isfinite(record.log_loss())
    assert embedding.bytes() > 0


def test_unknown_method_is_refused() -> None:
    with pytest.raises(ConfigError, match="method"):
        build("magic", SMALL.rows, 16, 0.5, FiitedConfig(chunk=4, budget_ratio=0.5))
