"""The benchmark of FedTrans at a tiny size: the contest, what it keeps, and how it counts work."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.bench.fedtrans import arena, contest, convolutional
from raysys.federated.core.engine import FederatedJob
from raysys.federated.core.runner import run_rounds
from raysys.federated.fedtrans.config import FedTransConfig, GrowthConfig


@pytest.fixture(autouse=True)
def packaged_data_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena.machine, "data_dir", lambda: None)


def test_every_rival_plays_at_the_same_work_and_pieces_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert arena.data_sets() == ("digits",)
    config = FedTransConfig(growth=GrowthConfig(delta=2, gamma=2, smooth=1, beta=10.0))
    places = [{"data": "digits", "split": "dirichlet", "seed": 11}]
    table = contest._table(str(tmp_path), places, config, 8)
    assert list(table) == ["fedtrans", *contest.RIVALS]
    ours = table["fedtrans"][0]
    assert len(ours["models"]) > 1
    most = max(row["macs"] / row["rounds"] for rows in table.values() for row in rows)
    for name in contest.RIVALS:
        row = table[name][0]
        assert ours["macs"] <= row["macs"] <= ours["macs"] + 2 * most, name
        assert 0 <= row["accuracy"] <= 1
    monkeypatch.setattr(contest, "play", None)  # all is kept: nothing is played again
    kept = contest._table(str(tmp_path), places, config, 8)
    assert {name: rows[0]["accuracy"] for name, rows in kept.items()} == {
        name: rows[0]["accuracy"] for name, rows in table.items()
    }


def test_convolutions_are_counted_by_their_own_work() -> None:
    place = arena.make_arena("digits", "dirichlet", 11, convolutional.FIRST)
    growth = GrowthConfig(delta=1, gamma=1, smooth=1, beta=10.0, widen=2.0)
    ours = arena.fedtrans(place, FedTransConfig(growth=growth))
    (report,) = run_rounds(FederatedJob(ours, place.population, 11), place.data.samples(), 1)
    clients = report.table.clients
    assert (ours.placed(clients) == 0).all()
    counts = place.population.counts(clients)
    samples = sum(20 * min(10, int(n)) for n in counts)
    work = convolutional._work(place, ours, report)
    assert work == 3.0 * place.net.macs() * samples == convolutional._work(place, place.net, report)
    assert work > report.macs  # which counts a multiply-accumulate per parameter
