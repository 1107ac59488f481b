"""Row statistics, recorder and accumulator: formulas by hand, replays, padding, failures."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.errors import ConfigError, DataError, RemoteError
from raysys.training.ccs.accumulator import ScoreAccumulator, ScoringConfig
from raysys.training.ccs.dynamics import LOSS_CAP, StatBatch, final_statistics, row_statistics
from raysys.training.ccs.recorder import DynamicsRecorder
from raysys.training.ccs.store import (
    read_scores,
    read_snapshot,
    with_meta,
    write_scores,
    write_snapshot,
)
from raysys.training.ccs.table import ScoreTable, check_labels, stable_ids


def batch(
    epoch: int, right: list[int], *, ids: list[int] | None = None, sequence: int = 0, rank: int = 0
) -> StatBatch:
    """Visits with p_true 0.9 where right, 0.2 where wrong; margins to match."""
    flags = np.asarray(right, bool)
    p = np.where(flags, 0.9, 0.2).astype(np.float32)
    known = np.arange(len(flags)) if ids is None else np.asarray(ids)
    margin = (2 * p - 1).astype(np.float32)
    return StatBatch(epoch, rank, sequence, known, known % 3, margin, p, 1 - p, flags)


def test_row_statistics_by_hand() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    margin, p_true, el2n, right = row_statistics(p.log(), torch.tensor([0, 1]))
    torch.testing.assert_close(margin, torch.tensor([0.5, -0.3]))
    torch.testing.assert_close(p_true, torch.tensor([0.7, 0.3]))
    expected = [(0.3**2 + 0.2**2 + 0.1**2) ** 0.5, (0.1**2 + 0.7**2 + 0.6**2) ** 0.5]
    torch.testing.assert_close(el2n, torch.tensor(expected))
    assert right.tolist() == [1, 0]


def test_logit_margin_and_half_precision() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5]])
    label = torch.tensor([0])
    assert float(row_statistics(logits, label, "logit")[0]) == pytest.approx(1.5)
    half = row_statistics(torch.tensor([[30.0, -torch.inf]]).half(), label)
    assert torch.isfinite(half).all()
    assert float(half[0]) == 1.0


def test_final_statistics_are_finite_where_probabilities_vanish() -> None:
    entropy, loss = final_statistics(
        torch.tensor([[0.0, -torch.inf], [0.0, 0.0]]), torch.tensor([1, 0])
    )
    assert entropy.tolist() == pytest.approx([0.0, np.log(2)])
    assert loss.tolist() == pytest.approx([LOSS_CAP, np.log(2)])
    assert final_statistics(torch.zeros(1, 2), None)[1].item() == 0


def test_scores_by_hand() -> None:
    """Rights 1 0 1, 0 0 0, 1 1 1 over three epochs."""
    store = ScoreAccumulator(np.arange(3), ScoringConfig(el2n_epochs=2))
    for epoch, right in enumerate([[1, 0, 1], [0, 0, 1], [1, 0, 1]]):
        store.add(batch(epoch, right))
        assert store.commit(epoch) == 3
    table = store.to_table()
    np.testing.assert_allclose(table.score("aum"), [(0.8 - 0.6 + 0.8) / 3, -0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(table.score("el2n"), [(0.1 + 0.8) / 2, 0.8, 0.1], rtol=1e-6)
    np.testing.assert_array_equal(table.score("forgetting"), [1, 2, 0])  # never learned: max + 1
    np.testing.assert_allclose(table.score("correctness"), [2 / 3, 0, 1])
    np.testing.assert_allclose(table.score("confidence"), [2 / 3, 0.2, 0.9], rtol=1e-6)
    np.testing.assert_allclose(table.score("variability"), [np.sqrt(0.98 / 9), 0, 0], atol=1e-4)
    released = ScoreAccumulator(np.arange(3), ScoringConfig(never_learned="zero", mean=False))
    for epoch, right in enumerate([[1, 0, 1], [0, 0, 1], [1, 0, 1]]):
        released.add(batch(epoch, right))
        released.commit(epoch)
    np.testing.assert_array_equal(released.to_table().score("forgetting"), [1, 0, 0])
    np.testing.assert_allclose(released.to_table().score("aum"), [1.0, -1.8, 2.4], rtol=1e-6)


def test_padding_counts_once_and_the_first_visit_wins() -> None:
    store = ScoreAccumulator(np.arange(2))
    store.add(batch(0, [0, 1], ids=[0, 1], rank=0))
    store.add(batch(0, [1], ids=[0], rank=1))  # a distributed sampler's padding
    assert store.commit(0) == 2
    np.testing.assert_allclose(store.to_table().score("confidence"), [0.2, 0.9], rtol=1e-6)


def test_a_retried_epoch_replaces_and_late_retries_are_ignored() -> None:
    store = ScoreAccumulator(np.arange(2))
    store.add(batch(0, [1, 1]))
    store.add(batch(0, [1, 1]))
    store.commit(0)
    store.add(batch(0, [1, 1]))  # a retry that arrives after the commit
    store.add(batch(1, [0, 0]))
    store.commit(1)
    store.reopen(1)
    store.add(batch(1, [1, 0]))
    store.commit(1)
    assert store.commit(1) == 0
    once = ScoreAccumulator(np.arange(2))
    for epoch, right in ((0, [1, 1]), (1, [1, 0])):
        once.add(batch(epoch, right))
        once.commit(epoch)
    for name, values in once.to_table().scores.items():
        np.testing.assert_array_equal(store.to_table().scores[name], values)
    with pytest.raises(ConfigError, match="snapshot"):
        store.reopen(0)
    with pytest.raises(ConfigError, match=r"reopen\(1\)"):
        store.add(batch(1, [1], ids=[0], sequence=9))


def test_lost_batches_are_noticed() -> None:
    store = ScoreAccumulator(np.arange(2))
    store.add(batch(0, [1], ids=[0]))
    with pytest.raises(RemoteError, match="1 of 2 batches"):
        store.commit(0, expected=2)
    store.add(batch(0, [1], ids=[1], sequence=1))
    assert store.commit(0, expected=2) == 2


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(0, 100))
def test_scores_do_not_depend_on_how_ranks_were_split(world: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    right = rng.integers(0, 2, (4, 30))
    one, many = ScoreAccumulator(np.arange(30)), ScoreAccumulator(np.arange(30))
    for epoch in range(4):
        one.add(batch(epoch, right[epoch].tolist()))
        one.commit(epoch)
        order = rng.permutation(30)
        parts = [(rank, order[rank::world]) for rank in range(world)]
        for rank, ids in reversed(parts):  # ranks arrive in any order
            many.add(batch(epoch, right[epoch][ids].tolist(), ids=ids.tolist(), rank=rank))
        many.commit(epoch)
    for name, values in one.to_table().scores.items():
        np.testing.assert_array_equal(many.to_table().scores[name], values)


def test_restart_from_a_snapshot_and_replay_equals_no_interruption(tmp_path: Path) -> None:
    rights = [[1, 0, 1], [0, 1, 1], [1, 1, 0], [0, 1, 1]]
    whole, first = ScoreAccumulator(np.arange(3)), ScoreAccumulator(np.arange(3))
    for epoch, right in enumerate(rights):
        whole.add(batch(epoch, right))
        whole.commit(epoch)
    path = str(tmp_path / "snapshot.parquet")
    for epoch in (0, 1):
        first.add(batch(epoch, rights[epoch]))
        first.commit(epoch)
        write_snapshot(path, first.state_dict())
    first.add(batch(2, rights[2]))  # lost with the worker
    second = ScoreAccumulator(np.arange(3))
    second.load_state_dict(read_snapshot(path))
    assert second.committed_epoch == 1
    for epoch in (2, 3):
        second.add(batch(epoch, rights[epoch]))
        second.commit(epoch)
    for name, values in whole.to_table().scores.items():
        np.testing.assert_array_equal(second.to_table().scores[name], values)
    with pytest.raises(ConfigError, match="same examples"):
        ScoreAccumulator(np.arange(4)).load_state_dict(read_snapshot(path))


def test_accumulator_rejects_what_it_does_not_know() -> None:
    store = ScoreAccumulator(np.asarray([3, 7, 1000]))
    store.add(batch(0, [1, 0], ids=[3, 8]))
    with pytest.raises(ConfigError, match=r"known ids, got \[8\]"):
        store.commit(0)
    store = ScoreAccumulator(np.arange(2))
    store.add(batch(0, [1, 0]))
    store.commit(0)
    store.add(dataclasses.replace(batch(1, [1, 0]), labels=np.asarray([2, 1])))
    with pytest.raises(ConfigError, match="stable ids"):
        store.commit(1)
    with pytest.raises(ConfigError, match="visits"):
        ScoreAccumulator(np.arange(2)).to_table()
    with pytest.raises(ConfigError, match="at least one"):
        ScoreAccumulator(np.zeros(0, np.int64))
    assert ScoreAccumulator(np.arange(1000)).state_bytes <= 64 * 1000


def test_recorder_equals_direct_statistics_and_keeps_order() -> None:
    torch.manual_seed(0)
    sent: list[StatBatch] = []
    recorder = DynamicsRecorder(sent.append, rank=2, ring=3)
    logits = torch.randn(5, 4, 10, requires_grad=True)
    labels = torch.randint(0, 10, (5, 4))
    recorder.start_epoch(0)
    for step in range(5):
        recorder.record(np.arange(4) + 4 * step, logits[step], labels[step])
    recorder.start_epoch(1)
    assert [item.key for item in sent] == [(0, 2, 0), (0, 2, 1)]
    np.testing.assert_array_equal(np.concatenate([b.ids for b in sent]), np.arange(20))
    expected = row_statistics(logits.flatten(0, 1), labels.flatten())
    np.testing.assert_allclose(np.concatenate([b.margin for b in sent]), expected[0].numpy())
    np.testing.assert_allclose(np.concatenate([b.el2n for b in sent]), expected[2].numpy())


def test_recorder_rejects_bad_calls() -> None:
    recorder = DynamicsRecorder(lambda item: None)
    logits, labels = torch.zeros(2, 3), torch.tensor([0, 1])
    for ids, given_logits, given_labels, text in (
        ([0], logits, labels, "as many ids"),
        ([0, 1], logits, None, "AUM, EL2N and forgetting need labels"),
        ([0, 1], logits, labels.float(), r"int \(B,\)"),
        ([0, 1], logits, torch.eye(2), "multi-label"),
        ([0, 1], logits[:, :1], labels, "C >= 2"),
    ):
        with pytest.raises(ConfigError, match=text):
            recorder.record(ids, given_logits, given_labels)  # type: ignore[arg-type]
    recorder.record([5, 6], torch.tensor([[0.0, 1.0], [torch.nan, 0.0]]), labels)
    with pytest.raises(ConfigError, match=r"ids \[6\].*diverged"):
        recorder.flush()
    with pytest.raises(ConfigError, match="ring"):
        DynamicsRecorder(lambda item: None, ring=0)
    with pytest.raises(ConfigError, match="epoch"):
        recorder.start_epoch(-1)


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (np.eye(3), "multi-label"),
        (np.asarray([0.5, 1.0]), "regression"),
        (np.asarray([0, 3]), r"\[0, 3\)"),
        (np.asarray([-1, 0]), r"\[0, 3\)"),
    ],
)
def test_labels_are_checked(labels: np.ndarray, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        check_labels(labels, 3)


def test_text_ids_map_stably() -> None:
    ids, mapping = stable_ids(["b", "c", "a"])
    assert ids.tolist() == [1, 2, 0]
    assert mapping == {"a": 0, "b": 1, "c": 2}
    with pytest.raises(ConfigError, match="'b'"):
        stable_ids(["b", "a", "b"])


def test_score_files_round_trip_and_damage_is_found(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = ScoreTable(np.arange(9), {"aum": np.arange(9.0)}, np.arange(9) % 2)
    path = tmp_path / "scores.parquet"
    write_scores(str(path), table)
    again = read_scores(str(path))
    np.testing.assert_array_equal(again.score("aum"), table.score("aum"))
    assert again.fingerprint() == table.fingerprint()
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(DataError, match="not a whole Parquet"):
        read_scores(str(path))
    pq.write_table(pa.table({"id": [1]}), path)
    with pytest.raises(DataError, match="schema version none"):
        read_scores(str(path))
    columns = pa.table({"id": np.arange(3), "aum": np.zeros(3)})
    pq.write_table(with_meta(columns, {"kind": "scores", "fingerprint": "3-00"}), path)
    with pytest.raises(DataError, match="fingerprint"):
        read_scores(str(path))
    with pytest.raises(DataError, match="'scores', not 'snapshot'"):
        read_snapshot(str(path))
