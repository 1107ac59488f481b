"""Selection, coverage and beta search as Ray tasks."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.ccs import (
    Columns,
    auto_beta,
    coreset_dataset,
    coverage_tasks,
    row_finder,
    select_dataset,
    select_parquet,
    train_many,
)
from actors.ccs.selection import count_rows, pieces_of, run_pass
from actors.session import Session
from raysys.errors import ConfigError, DataError, StorageError
from raysys.training.ccs.auto_beta import AutoBetaConfig
from raysys.training.ccs.blocks import SurveyPass
from raysys.training.ccs.coreset import Coreset
from raysys.training.ccs.coverage import coverage
from raysys.training.ccs.proxy import ProxyConfig, score_run
from raysys.training.ccs.selection import SelectionConfig, select_ccs
from raysys.training.ccs.store import write_scores
from raysys.training.ccs.table import ScoreTable
from raysys.training.datasets import digits


def make_table(rows: int = 3000) -> ScoreTable:
    rng = np.random.default_rng(0)
    scores = {"aum": rng.normal(size=rows), "el2n": rng.gamma(2.0, size=rows)}
    return ScoreTable(rng.permutation(3 * rows)[:rows], scores, rng.integers(0, 4, rows))


def arrow(table: ScoreTable) -> pa.Table:
    return pa.table({"id": table.ids, "label": table.labels, **table.scores})


def test_parquet_selection_equals_memory_for_any_partition(
    ray_session: Session, tmp_path: Path
) -> None:
    table = make_table()
    order = np.random.default_rng(1).permutation(len(table))
    paths = []
    for index, rows in enumerate(np.array_split(order, 5)):
        paths.append(str(tmp_path / f"{index}.parquet"))
        pq.write_table(arrow(table.take(rows)), paths[-1], row_group_size=100)
    assert count_rows(paths) == 3000
    config = SelectionConfig(beta=0.15, seed=2, class_balanced=True)
    wanted = select_ccs(table, 400, config, score="el2n")
    for partitions in (1, 7):
        columns = Columns(score="el2n", label="label")
        found = select_parquet(paths, 400, config, columns, partitions=partitions)
        np.testing.assert_array_equal(found.ids, wanted.ids)
        np.testing.assert_array_equal(found.classes_after, wanted.classes_after)
        assert found.fingerprint == table.fingerprint()


def test_ray_data_selection_and_semi_join(ray_session: Session) -> None:
    import ray

    table = make_table(800)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray Data's own deprecations
        dataset = ray.data.from_arrow([arrow(table.take(np.arange(i, 800, 3))) for i in range(3)])
        found = select_dataset(dataset, 90, SelectionConfig(beta=0.1))
        np.testing.assert_array_equal(found.ids, select_ccs(
            ScoreTable(table.ids, table.scores), 90, SelectionConfig(beta=0.1)
        ).ids)  # fmt: skip
        dataset.context.execution_options.preserve_order = True
        kept = [row["id"] for row in coreset_dataset(dataset, Coreset(found.ids, {})).take_all()]
    assert sorted(kept) == found.ids.tolist()
    in_order = np.concatenate([table.ids[i::3] for i in range(3)])
    assert kept == in_order[np.isin(in_order, found.ids)].tolist()


def test_pieces_cover_every_row_group_once(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    pq.write_table(
        pa.table({"id": np.arange(1000), "aum": np.zeros(1000)}), path, row_group_size=64
    )
    for partitions in (1, 3, 64):
        shares = pieces_of([path], partitions)
        assert len(shares) <= partitions
        answers = [a for share in shares for a in run_pass(SurveyPass(False), share, Columns())]
        assert sum(answer.rows for answer in answers) == 1000


def test_bad_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    with pytest.raises(StorageError, match="does not exist"):
        pieces_of([str(path)], 2)
    with pytest.raises(StorageError, match="no files"):
        pieces_of([], 2)
    write_scores(str(path), make_table(50))
    with pytest.raises(ConfigError, match="partitions"):
        pieces_of([str(path)], 0)
    share = pieces_of([str(path)], 1)[0]
    with pytest.raises(DataError, match=r"lacks \['grand'\]"):
        run_pass(SurveyPass(False), share, Columns(score="grand"))
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(DataError, match="not a whole Parquet"):
        pieces_of([str(path)], 1)
    pq.write_table(pa.table({"id": ["a", "b"], "aum": [0.1, 0.2]}), path)
    with pytest.raises(ConfigError, match="integer ids"):
        run_pass(SurveyPass(False), pieces_of([str(path)], 1)[0], Columns())
    pq.write_table(pa.table({"id": [1, 2], "aum": [0.1, None]}), path)
    with pytest.raises(ConfigError, match="null"):
        run_pass(SurveyPass(False), pieces_of([str(path)], 1)[0], Columns())


def test_a_bad_row_surfaces_through_ray_as_our_error(ray_session: Session, tmp_path: Path) -> None:
    path = str(tmp_path / "bad.parquet")
    pq.write_table(pa.table({"id": [1, 2, 3], "aum": [0.1, float("nan"), 0.3]}), path)
    with pytest.raises(ConfigError, match=r"ids \[2\]"):
        select_parquet([path], 1, SelectionConfig())


def test_coverage_tasks_equal_one_process(ray_session: Session) -> None:
    kept, targets = np.random.default_rng(0).normal(size=(2, 300, 8)).astype(np.float32)
    assert coverage_tasks(kept, targets, shards=7) == coverage(kept, targets)


def test_beta_search_on_digits_avoids_noise(ray_session: Session) -> None:
    """With a fifth of the labels flipped, cutting nothing keeps mostly flipped ones."""
    from raysys.training.datasets import flip_labels

    train = digits().train
    noisy = train.with_labels(flip_labels(train.y, 0.2, 10, seed=0)[0])
    proxy = ProxyConfig(channels=(4, 8, 8), iterations=60, score_iterations=150, batch=64)
    table = score_run(noisy, proxy)[1]
    config = AutoBetaConfig(betas=(0.0, 0.3), repeats=2)
    choice = auto_beta(noisy, table, 140, proxy, config)
    assert choice.beta == 0.3
    assert choice.accuracy[0.3] > choice.accuracy[0.0] + 0.1
    find = row_finder(train.ids)
    with pytest.raises(ConfigError, match="ids of the data set"):
        find(np.asarray([10**9]))
    values = train_many(train, [np.arange(100)] * 3, [0, 1, 0], train, proxy, stack=2)
    assert values[0] == pytest.approx(values[2], abs=0.02)
