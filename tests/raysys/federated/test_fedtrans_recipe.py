"""FedTrans by configuration: first model, device speeds, and the account that a job gives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from raysys.config import config_from_dict, config_to_dict
from raysys.errors import CapabilityError, ConfigError, DataError
from raysys.federated.core.datasets import FederatedData, load_digits_data
from raysys.federated.core.engine import FederatedJob
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.partition import iid
from raysys.federated.core.recipe import ModelConfig
from raysys.federated.core.runner import run_rounds
from raysys.federated.fedtrans.attention import Attention, Patches
from raysys.federated.fedtrans.cells import Conv, Dense
from raysys.federated.fedtrans.config import GrowthConfig
from raysys.federated.fedtrans.drawing import family_section, lines
from raysys.federated.fedtrans.explain import explain
from raysys.federated.fedtrans.recipe import (
    FamilyConfig,
    first_net,
    simulated_speeds,
    with_speeds,
)
from raysys.federated.fedtrans.strategy import FedTrans
from raysys.report import render_page


@pytest.fixture(scope="module")
def digits() -> FederatedData:
    return load_digits_data(0, image=True)


def test_the_first_model_comes_from_the_recipe_or_from_cells(digits: FederatedData) -> None:
    plain = first_net(FamilyConfig(), ModelConfig(hidden=(4, 3)), digits)
    assert plain.cells == (Dense(width=4), Dense(width=3))
    assert plain.shape == (1, 8, 8)
    image = first_net(FamilyConfig(), ModelConfig(kind="cnn", channels=(2, 3)), digits)
    assert image.cells == (Conv(channels=2, pool=True), Conv(channels=3, pool=True))
    given = config_from_dict(
        FamilyConfig,
        {
            "cells": [
                {"kind": "Patches", "patch": 4, "dim": 6},
                {"kind": "Attention", "heads": 1, "head_dim": 4, "mlp": 3},
            ],
            "growth": {"delta": 7},
        },
    )
    assert config_from_dict(FamilyConfig, config_to_dict(given)) == given
    net = first_net(given, ModelConfig(kind="linear"), digits)
    assert net.cells == (Patches(patch=4, dim=6), Attention(heads=1, head_dim=4, mlp=3))
    with pytest.raises(ConfigError, match=r"family\.cells"):
        first_net(FamilyConfig(), ModelConfig(kind="linear"), digits)
    wrong = FamilyConfig(cells=({"kind": "Conv", "chanels": 3},))
    with pytest.raises(ConfigError, match="chanels"):
        first_net(wrong, ModelConfig(), digits)


def test_speeds_are_simulated_or_measured(digits: FederatedData, tmp_path: Path) -> None:
    net = first_net(FamilyConfig(), ModelConfig(hidden=(4,)), digits)
    population = iid(200, 50, 0)
    family = FamilyConfig(spread=16)
    made = with_speeds(population, net, family, 1).rate_mac_s
    assert made is not None
    assert net.macs() <= made.min()
    assert made.max() <= 16 * net.macs()
    assert np.array_equal(made, simulated_speeds(50, net.macs(), 16, 1))
    table = tmp_path / "speeds.csv"
    table.write_text("client,mac_s\n" + "".join(f"{c},{100 + c}\n" for c in reversed(range(50))))
    measured = FamilyConfig(speeds_csv=str(table))
    found = with_speeds(population, net, measured, 1)
    assert found.rate_mac_s is not None
    assert np.array_equal(found.rate_mac_s, 100.0 + np.arange(50))
    assert with_speeds(found, net, family, 1) is found  # a population that knows its speeds
    for text, why in (
        ("client,mac_s\n0,5\n0,6\n", "twice"),
        ("client,mac_s\n0,5\n", "no client 1"),
        ("client,mac_s\n0,fast\n", "not a client"),
        ("who,mac_s\n0,5\n", "not a client"),
    ):
        table.write_text(text)
        with pytest.raises(DataError, match=why):
            with_speeds(population, net, measured, 1)
    with pytest.raises(CapabilityError):
        with_speeds(population, net, FamilyConfig(speeds_csv=str(tmp_path / "none")), 1)


def test_a_job_accounts_for_its_growth(digits: FederatedData) -> None:
    growth = GrowthConfig(delta=2, gamma=2, smooth=1, beta=10.0, max_models=4, widen=2.0)
    family = FamilyConfig(growth=growth, spread=8)
    net = first_net(family, ModelConfig(hidden=(4,)), digits)
    population = with_speeds(iid(len(digits.targets), 40, 0), net, family, 2)
    local = LocalConfig(steps=2, batch_size=5)
    ours = FedTrans(
        net, 20, lambda spec, start: FedAvg(spec, local, 20, start_weights=start), family
    )
    run_rounds(FederatedJob(ours, population, 2), digits.samples(), 13)
    slow = np.array([0, 1])
    ours.resize(slow, np.full(2, 1.0))
    ours.retire(1, 13)
    facts = json.loads(json.dumps(explain(ours), allow_nan=False))
    members = facts["family"]
    assert [member["macs"] for member in members] == ours.macs()
    assert sum(member["served"] for member in members) == 38
    assert facts["too_weak"] == 2
    assert [facts["clients"]["0"], facts["clients"]["1"]] == [-1, -1]
    assert [entry["child"] for entry in facts["decisions"]] == [1, 2, 3]
    assert all(entry["slope"] <= 10.0 for entry in facts["decisions"])
    assert sum(m["share"] for m in members) == pytest.approx(1.0)
    assert sum(m["served"] for m in explain(ours, slow)["family"]) == 0
    text = "\n".join(lines(facts))
    assert "M1 from M0: cell 0 widened 2 times" in text
    assert "within 10.00000 of level" in text
    assert "2 clients cannot run M0" in text
    assert "retired in round 13" in text
    page = render_page("t", "s", [family_section(facts)])
    assert "Genealogy of models" in page
    assert "<svg" in page
