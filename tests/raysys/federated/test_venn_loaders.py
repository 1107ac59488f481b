"""Trace loaders: Parquet, CSV, pickles that may be hostile, generated traces, workloads."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysys import machine
from raysys.errors import ConfigError, DataError, StorageError
from raysys.federated.venn.simulator import loaders
from raysys.federated.venn.simulator.workloads import (
    BIASED,
    STANDARD,
    WorkloadConfig,
    make_workload,
)


def test_records_are_joined_in_order_of_start() -> None:
    trace = loaders.build_trace(
        ([30, 10, 20], [5, 100, 7]), ([78.0, 156.0], [13_736, 6_868]), [0, 15], period_s=100
    )
    assert trace.start.tolist() == [10, 20, 30]
    assert trace.online.tolist() == [180, 87, 85]
    assert trace.compute.tolist() == [1, 2, 1]
    assert trace.comm.tolist() == [1, 2, 1]
    assert [trace.masks[atom] for atom in trace.atom] == [0, 15, 0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"intervals": ([], [])}, "empty"),
        ({"intervals": ([1.0], [-1.0])}, "ends before"),
        ({"intervals": ([np.nan], [1.0])}, "not finite"),
        ({"capacity": ([0.0], [1.0])}, "not positive"),
        ({"capacity": ([], [])}, "empty"),
        ({"masks": []}, "no records"),
    ],
)
def test_bad_columns_are_data_errors(change: dict[str, object], reason: str) -> None:
    good = {"intervals": ([1.0], [5.0]), "capacity": ([78.0], [1e4]), "masks": [1]}
    with pytest.raises(DataError, match=reason):
        loaders.build_trace(**{**good, **change})  # type: ignore[arg-type]


def write_folder(folder: Path, online: dict[str, list[float]]) -> None:
    pq.write_table(pa.table(online), folder / "fedscale_availability_recon.parquet")
    capacity = {"compute_ms": [50.0, 80.0], "bandwidth_kbps": [5000, 9000]}
    pq.write_table(pa.table(capacity), folder / "fedscale_device_capacity_recon.parquet")
    pq.write_table(pa.table({"mask": [0, 1, 15]}), folder / "venn_eligibility.parquet")


def test_folder_is_read_cut_and_extended(tmp_path: Path) -> None:
    online = {"device_id": [0, 0, 1], "start_s": [5, 500, 7], "duration_s": [100, 50, 60]}
    write_folder(tmp_path, online)
    assert len(loaders.load_trace(tmp_path)) == 3
    assert len(loaders.load_trace(tmp_path, devices=1)) == 2
    more = loaders.load_trace(tmp_path, devices=5)
    assert len(more) == 8
    assert (np.diff(more.start) >= 0).all()
    with pytest.raises(ConfigError, match="devices"):
        loaders.load_trace(tmp_path, devices=0)


def test_overlaps_missing_columns_and_files_are_named(tmp_path: Path) -> None:
    overlap = {"device_id": [3, 3], "start_s": [5, 50], "duration_s": [100, 50]}
    write_folder(tmp_path, overlap)
    with pytest.raises(DataError, match="device 3 overlap"):
        loaders.load_trace(tmp_path)
    write_folder(tmp_path, {"device_id": [1], "start_s": [3]})
    with pytest.raises(DataError, match="'duration_s'"):
        loaders.load_trace(tmp_path)
    with pytest.raises(StorageError, match="no such file"):
        loaders.read_columns(tmp_path / "none.parquet", ("a",))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match=r"bad\.parquet"):
        loaders.read_columns(tmp_path / "bad.parquet", ("a",))


def test_a_folder_of_csv_and_original_pickles_gives_the_same_trace(tmp_path: Path) -> None:
    online = {"device_id": [0, 0, 1], "start_s": [5, 500, 7], "duration_s": [100, 50, 60]}
    write_folder(tmp_path, online)
    expected = loaders.load_trace(tmp_path)
    others = tmp_path / "others"
    others.mkdir()
    behave = {1: {"active": [5, 500], "inactive": [105, 550]}, 2: {"active": [7], "inactive": [67]}}
    capacity = {
        1: {"computation": 50.0, "communication": 5000},
        2: {"computation": 80.0, "communication": 9000},
    }
    (others / "client_behave_trace").write_bytes(pickle.dumps(behave))
    (others / "client_device_capacity").write_bytes(pickle.dumps(capacity))
    (others / "venn_eligibility.csv").write_text("mask\n0\n1\n15\n", encoding="utf-8")
    found = loaders.load_trace(others)
    for name in ("start", "online", "compute", "comm", "atom"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
    assert found.masks == expected.masks


def test_csv_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "capacity.csv"
    path.write_text("compute_ms,bandwidth_kbps\n50,5000\n80,9000\n", encoding="utf-8")
    columns = loaders.read_columns(path, ("bandwidth_kbps", "compute_ms"))
    assert [column.tolist() for column in columns] == [[5000, 9000], [50, 80]]
    path.write_text("compute_ms,bandwidth_kbps\nfast,5000\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"capacity\.csv"):
        loaders.read_columns(path, ("compute_ms",))


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch hostile",)


def test_pickles_hold_plain_values_only(tmp_path: Path) -> None:
    path = tmp_path / "trace.pkl"
    records = {"7": {"active": [0, 100], "inactive": [50, 180]}}
    path.write_bytes(pickle.dumps(records))
    start, duration = loaders.fedscale_intervals(loaders.load_pickle(path))
    assert (start.tolist(), duration.tolist()) == ([0, 100], [50, 80])
    capacity = {1: {"computation": 78.0, "communication": 9e3}}
    path.write_bytes(pickle.dumps(capacity))
    assert loaders.fedscale_capacity(loaders.load_pickle(path))[0].tolist() == [78.0]
    path.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(DataError, match="only plain containers"):
        loaders.load_pickle(path)
    assert not Path("hostile").exists()
    path.write_bytes(pickle.dumps(records)[:-9])
    with pytest.raises(DataError, match="damaged"):
        loaders.load_pickle(path)
    with pytest.raises(StorageError):
        loaders.load_pickle(tmp_path / "none.pkl")


@pytest.mark.parametrize(
    "records",
    [
        {"7": {"active": [0], "inactive": []}},
        {"7": {"active": [5], "inactive": [5]}},
        {"7": {"active": ["x"], "inactive": [5]}},
        {"7": 3},
        {},
        [1, 2],
    ],
)
def test_wrong_pickle_content_is_a_data_error(records: object) -> None:
    with pytest.raises(DataError):
        loaders.fedscale_intervals(records)


def test_generated_trace_has_the_real_shares_of_atoms() -> None:
    trace = loaders.generated_trace(20_000, seed=1)
    shares = np.bincount(trace.atom) / len(trace)
    assert dict(zip(trace.masks, shares)) == pytest.approx(
        {mask: count / 959 for mask, count in loaders.REAL_MASKS}, abs=0.01
    )
    assert np.array_equal(trace.start, loaders.generated_trace(20_000, seed=1).start)


@pytest.mark.parametrize("name", [*STANDARD, *BIASED])
def test_workloads_are_reproducible_and_shaped(name: str) -> None:
    first = make_workload(WorkloadConfig(name=name))
    assert first == make_workload(WorkloadConfig(name=name))
    assert first != make_workload(WorkloadConfig(name=name, seed=99))
    assert len(first.jobs) == 50
    arrivals = [job.arrival_s for job in first.jobs]
    assert arrivals == sorted(arrivals)
    groups = np.bincount([job.group for job in first.jobs], minlength=4)
    if name in BIASED:
        assert int(groups.argmax()) == BIASED.index(name)
    else:
        assert groups.tolist() == [13, 13, 12, 12]


def test_full_size_keeps_the_published_numbers() -> None:
    full = make_workload(WorkloadConfig(name="high", scale_devices=1, scale_rounds=1))
    assert min(job.participants for job in full.jobs) >= 400
    assert full.jobs[0].arrival_s == 3600
    with pytest.raises(ConfigError, match="name"):
        WorkloadConfig(name="odd")


@pytest.mark.skipif(machine.data_dir() is None, reason="the optional data folder is absent")
def test_real_files_match_their_description() -> None:
    folder = machine.data_dir()
    assert folder is not None
    trace = loaders.load_trace(folder, 10_775)
    assert trace.masks == (0, 1, 3, 5, 15)
    assert len(trace) == pytest.approx(159_692, rel=0.01)
    assert float(trace.compute.mean()) == pytest.approx(1.0, abs=0.02)
