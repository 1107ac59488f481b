"""The coordinator of rounds: what a restarted one still knows."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.fiited.journal import new_journal
from actors.fiited.rounds import RoundCoordinator
from raysys.errors import RemoteError
from raysys.ops import fiited_abi as abi
from raysys.training.fiited.sharding.rounds import Wishes


def histogram(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 5, abi.BINS)


def members(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.random(count, np.float32), rng.integers(0, 1 << 60, count, dtype=np.uint64)


def merge(coordinator: RoundCoordinator, phase: str, parts: list[Any]) -> list[Any]:
    async def both() -> list[Any]:
        calls = (coordinator.merge(3, phase, i, part) for i, part in enumerate(parts))
        return list(await asyncio.gather(*calls))

    return asyncio.run(both())


def test_a_restarted_coordinator_answers_a_replay_alone(tmp_path: Path) -> None:
    journal = new_journal(str(tmp_path))
    bins = [(histogram(0), 40), (histogram(1), 40)]
    first = RoundCoordinator(2, 9, journal)
    (where, _) = merge(first, "bin", bins)
    assert where.index >= 0
    again = RoundCoordinator(2, 9, journal)  # killed between two phases
    assert asyncio.run(again.merge(3, "bin", 1, bins[1])) == where
    many = where.keep + 3
    cuts = merge(again, "cut", [members(2, many), members(3, many)])
    wishes = [Wishes(members(4 + i, 5), members(6 + i, 7), 20) for i in range(2)]
    orders = merge(again, "orders", wishes)
    last = RoundCoordinator(2, 9, journal)
    for phase, found in (("bin", [where] * 2), ("cut", cuts), ("orders", orders)):
        for shard in range(2):
            assert asyncio.run(last.merge(3, phase, shard, None)) == found[shard]


def test_a_torn_line_and_forgotten_rounds_are_left_out(tmp_path: Path) -> None:
    journal = new_journal(str(tmp_path))
    bins = [(histogram(0), 40), (histogram(1), 40)]
    (where, _) = merge(RoundCoordinator(2, 9, journal), "bin", bins)
    with Path(journal).open("a") as file:
        file.write('{"round": 3, "pha')
    again = RoundCoordinator(2, 9, journal)
    assert asyncio.run(again.merge(3, "bin", 0, None)) == where
    cuts = merge(again, "cut", [members(2, where.keep + 3), members(3, where.keep + 3)])
    assert asyncio.run(RoundCoordinator(2, 9, journal).merge(3, "cut", 1, None)) == cuts[1]
    again.forget(4)
    assert RoundCoordinator(2, 9, journal).health() == {"remembered": 0, "waiting": 0}


def test_a_new_group_starts_an_empty_journal(tmp_path: Path) -> None:
    old = new_journal(str(tmp_path))
    merge(RoundCoordinator(1, 9, old), "bin", [(histogram(0), 40)])
    assert RoundCoordinator(1, 9, new_journal(str(tmp_path))).health()["remembered"] == 0
    assert not Path(old).exists()
    assert new_journal("") == ""


def test_without_a_journal_the_loss_is_told() -> None:
    with pytest.raises(RemoteError, match="lost with the coordinator"):
        merge(RoundCoordinator(1, 9), "cut", [members(2, 4)])
