"""Swan on Linux: made-up sysfs trees, refused affinity, sensors, checkpoints, a live training."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from actors.swan.affinity import Applied, apply_affinity, residency, run_times, threads
from actors.swan.checkpoint import (
    CheckpointFolder,
    ResumableSampler,
    random_state,
    restore_random_state,
)
from actors.swan.discovery import clock_share, discover, gone
from actors.swan.engine import EngineConfig, Swan
from actors.swan.pressure import PressureReader
from actors.swan.sensors import choose_meter, read_battery, read_celsius
from actors.swan.sysfs import cpu_list
from raysys.errors import CapabilityError, ConfigError, DataError, InfeasibleError, StorageError
from raysys.federated.swan.choices import Choice, enumerate_choices
from raysys.federated.swan.pilot import Policy


def tree(root: Path, files: dict[str, object]) -> Path:
    """A folder with these files."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def cpus(count: int, **per_core: Iterable[object]) -> dict[str, object]:
    """Files of ``devices/system/cpu`` for some cores; names use ``__`` for a slash."""
    base = "devices/system/cpu"
    files: dict[str, object] = {f"{base}/online": f"0-{count - 1}" if count > 1 else "0"}
    for name, values in per_core.items():
        for core, value in enumerate(values):
            files[f"{base}/cpu{core}/{name.replace('__', '/')}"] = value
    return files


PHONE = [488] * 4 + [871] * 3 + [1024]


def test_phone_tree(tmp_path: Path) -> None:
    files = cpus(8, cpu_capacity=PHONE, cpufreq__cpuinfo_max_freq=[1785000] * 4 + [2841000] * 4)
    topology = discover(tree(tmp_path, files), tmp_path)
    assert [(c.kind, len(c.cores)) for c in topology.clusters] == [
        ("little", 4),
        ("big", 3),
        ("prime", 1),
    ]
    assert len(enumerate_choices(topology)) == 11
    assert discover(tmp_path, tmp_path, allowed=[0, 1, 7]).cores == (0, 1, 7)
    with pytest.raises(CapabilityError, match="usable core"):
        discover(tmp_path, tmp_path, allowed=[99])


def test_trees_with_parts_missing(tmp_path: Path) -> None:
    one = discover(tree(tmp_path / "one", cpus(1)), tmp_path)
    assert one.cores == (0,)
    assert "all cores count as equal" in " ".join(one.notes)
    assert discover(tmp_path / "nothing", tmp_path).cores == (0,)
    zero = cpus(2, cpu_capacity=[0, 0], cpufreq__cpuinfo_max_freq=[1000000, 2000000])
    by_clock = discover(tree(tmp_path / "zero", zero), tmp_path)
    assert [c.speed for c in by_clock.clusters] == [0.5, 1.0]
    odd = cpus(2, cpu_capacity=[512, 1024], cpufreq__cpuinfo_max_freq=[3000000, 2000000])
    by_capacity = discover(tree(tmp_path / "odd", odd), tmp_path)
    assert by_capacity.clusters[-1].cores == (1,), "capacity outranks the clock"
    hybrid = {**cpus(4), "devices/cpu_core/cpus": "0-1", "devices/cpu_atom/cpus": "2-3"}
    intel = discover(tree(tmp_path / "hybrid", hybrid), tmp_path)
    assert [c.kind for c in intel.clusters] == ["little", "big"]
    midr = cpus(2, regs__identification__midr_el1=["0x00000000410fd050", "0x00000000410fd0d0"])
    arm = discover(tree(tmp_path / "midr", midr), tmp_path)
    assert [c.cores for c in arm.clusters] == [(0,), (1,)]
    unreadable = cpus(2, regs__identification__midr_el1=["?", "0x1"])
    assert len(discover(tree(tmp_path / "bad", unreadable), tmp_path).cores) == 2
    many = discover(tree(tmp_path / "many", cpus(128)), tmp_path)
    assert len(many.cores) == 128


def test_eight_and_eight_with_smt_use_one_thread_a_core_first(tmp_path: Path) -> None:
    siblings = [f"{core - core % 2}-{core - core % 2 + 1}" for core in range(16)]
    siblings += [str(core) for core in range(16, 24)]
    files = cpus(24, cpu_capacity=[1024] * 16 + [600] * 8, topology__thread_siblings_list=siblings)
    topology = discover(tree(tmp_path, files), tmp_path)
    little, big = topology.clusters
    assert big.cores[:8] == (0, 2, 4, 6, 8, 10, 12, 14)
    assert (little.physical, big.physical) == (8, 8)


def test_offline_cores_quota_and_cpuset(tmp_path: Path) -> None:
    files = {**cpus(8, cpu_capacity=PHONE), "devices/system/cpu/online": "0-2,7"}
    files["fs/cgroup/box/cpu.max"] = "150000 100000"
    files["fs/cgroup/box/cpuset.cpus.effective"] = "0-1,7"
    tree(tmp_path, files)
    proc = tree(tmp_path / "proc", {"self/cgroup": "0::/box"})
    topology = discover(tmp_path, proc)
    assert topology.cores == (0, 1, 7)
    assert topology.quota == 1.5
    (tmp_path / "devices/system/cpu/online").write_text("0-1\n")
    assert gone(topology, tmp_path) == (7,)
    assert cpu_list("0-2,junk,5,7-") == (0, 1, 2, 5)
    capped = cpus(1, cpufreq__cpuinfo_max_freq=[2000000], cpufreq__scaling_max_freq=[1500000])
    assert clock_share([0], tree(tmp_path / "capped", capped)) == 0.75


def test_affinity_refused_or_gone() -> None:
    def refuse(thread: int, cores: Iterable[int]) -> None:
        raise PermissionError(1, "Operation not permitted")

    refused = apply_affinity([0], setter=refuse)
    assert isinstance(refused, Applied)
    assert not refused.complete
    assert "not permitted" in refused.refused[0][1]

    def vanish(thread: int, cores: Iterable[int]) -> None:
        raise ProcessLookupError(3, "No such process")

    assert apply_affinity([0], setter=vanish).complete
    assert os.getpid() in threads()
    before = run_times()
    assert residency(before, before, [0]) == 1.0
    assert residency({1: (0.0, 0)}, {1: (1.0, 1), 2: (3.0, 0)}, [0]) == 0.75


def test_sensors_believe_only_what_can_be(tmp_path: Path) -> None:
    clock = iter(float(n) for n in range(100)).__next__
    topology = discover(tree(tmp_path, cpus(2)), tmp_path)
    assert choose_meter(topology, clock, tmp_path).source.startswith("power model")
    assert read_battery(tmp_path)[0].external
    tree(tmp_path, {"class/hwmon/hwmon0/power1_input": 4_000_000})
    assert choose_meter(topology, clock, tmp_path).read((0,)) == pytest.approx(4.0)
    supply = {"type": "Battery", "current_now": -500000, "voltage_now": 3850000, "temp": 412}
    supply |= {"capacity": 55, "status": "Unknown", "charge_full": 3_000_000}
    tree(tmp_path, {f"class/power_supply/bat/{name}": value for name, value in supply.items()})
    gauge = choose_meter(topology, clock, tmp_path)
    assert gauge.source == "fuel gauge"
    assert gauge.read((0,)) == pytest.approx(1.925)
    battery, energy_wh = read_battery(tmp_path)
    assert (battery.level, battery.external) == (0.55, False), "unknown status is the careful side"
    assert energy_wh == pytest.approx(11.55)
    zones = {"thermal_zone0/type": "cpu-0", "thermal_zone0/temp": 80000}
    zones |= {"thermal_zone1/type": "skin-therm", "thermal_zone1/temp": 255000}
    tree(tmp_path, {f"class/thermal/{name}": value for name, value in zones.items()})
    assert read_celsius(tmp_path) == pytest.approx(41.2)
    rapl = {"energy_uj": 900_000, "max_energy_range_uj": 1_000_000}
    tree(tmp_path, {f"class/powercap/intel-rapl:0/{n}": value for n, value in rapl.items()})
    meter = choose_meter(topology, clock, tmp_path)
    assert meter.source == "RAPL (package)"
    tree(tmp_path, {"class/powercap/intel-rapl:0/energy_uj": 100_000})
    assert meter.read((0,)) == pytest.approx(0.2), "the counter has wrapped"
    stuck = [meter.read((0,)) for _ in range(4)]
    assert stuck[0] == 0.0
    assert math.isnan(stuck[-1])


def test_pressure_is_others_time_less_our_own(tmp_path: Path) -> None:
    def stat(busy: int, idle: int, stolen: int = 0) -> str:
        return f"cpu0 {busy} 0 0 {idle} 0 0 0 {stolen} 0 0\ncpu1 0 0 0 {busy + idle} 0 0 0 0 0 0"

    psi = "some avg10=0.00 avg60=0.00 avg300=0.00 total="
    files = {"stat": stat(0, 0), "pressure/cpu": psi + "0", "self/task/1/schedstat": "0 0 0"}
    files["self/task/1/stat"] = "1 (a b) " + " ".join(["0"] * 50)
    tree(tmp_path, files)
    times = iter([0.0, 0.0, 1.0, 2.0])
    reader = PressureReader(times.__next__, tmp_path)
    tree(tmp_path, {"stat": stat(80, 20, 40), "pressure/cpu": psi + "250000"})
    tree(tmp_path, {"self/task/1/schedstat": "300000000 0 0"})
    demand = reader.look()
    assert demand.shares[0] == pytest.approx(0.5)
    assert demand.shares[1] == 0.0
    assert demand.pressure == pytest.approx(0.25)
    (tmp_path / "stat").unlink()
    assert reader.look().shares == {}


def small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2))


def train(folder: Path | None, steps: int, stop_at: int = 0) -> torch.Tensor:
    """An ordinary loop under the engine; ``stop_at`` leaves it by an exception."""
    torch.manual_seed(0)
    model = small_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    sampler = ResumableSampler(40, seed=1)
    inputs = torch.from_numpy(np.random.default_rng(0).random((40, 8), dtype=np.float32))
    config = EngineConfig(
        policy=Policy(kind="fixed"), nice=0, checkpoint_s=1e-6, min_step_s=0.0, sample_s=5.0
    )
    with (
        Swan(config) as swan,
        swan.training(optimizer=optimizer, folder=folder, model=model, sampler=sampler) as task,
    ):
        while task.steps < steps:
            if stop_at and task.steps == stop_at:
                break
            batch = inputs[torch.from_numpy(next(sampler.batches(7)))]
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_resume_continues_at_the_exact_next_sample(tmp_path: Path) -> None:
    straight = train(None, 12)
    train(tmp_path, 12, stop_at=5)
    assert torch.equal(train(tmp_path, 12), straight)
    assert len(list(tmp_path.glob("step-*.swan"))) == 2


def test_torn_and_foreign_checkpoints(tmp_path: Path) -> None:
    store = CheckpointFolder(tmp_path)
    assert store.load() is None
    store.save(1, {"steps": 1})
    newest = store.save(2, {"steps": 2})
    newest.write_bytes(newest.read_bytes()[:-3])
    found = store.load()
    assert found is not None
    assert found[0] == 1, "the older generation is used"
    assert "checksum" in store.skipped[0]
    older = tmp_path / "step-000000000001.swan"
    older.write_bytes(b'{"magic": "raysys-swan", "version": 99, "step": 1, "sha256": ""}\n')
    with pytest.raises(DataError, match="version 99"):
        store.load()
    newest.write_bytes(b"junk")
    with pytest.raises(DataError, match="unreadable"):
        store.load()
    sampler = ResumableSampler(10)
    with pytest.raises(DataError, match="10 samples, not 11"):
        ResumableSampler(11).load_state_dict(sampler.state_dict())
    with pytest.raises(StorageError):
        CheckpointFolder(newest)


def test_full_disk_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointFolder(tmp_path)
    store.save(1, {"steps": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        store.save(2, {"steps": 2})
    found = store.load()
    assert found is not None
    assert found[0] == 1
    assert not list(tmp_path.glob(".part-*"))


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    train(tmp_path, 2)
    other = nn.Linear(3, 3)
    optimizer = torch.optim.Adam(other.parameters())
    with Swan(EngineConfig(nice=0)) as swan:
        with (
            pytest.raises(DataError, match=r"does not fit"),
            swan.training(
                optimizer=optimizer, folder=tmp_path, model=other, sampler=ResumableSampler(40)
            ),
        ):
            pass
        with (
            pytest.raises(DataError, match="the task has"),
            swan.training(optimizer=optimizer, folder=tmp_path),
        ):
            pass


def test_random_generators_come_back() -> None:
    state = random_state()
    first = (torch.rand(3), np.random.default_rng().bit_generator is not None, os.getpid())
    drawn = torch.rand(2)
    restore_random_state(state)
    assert torch.equal(torch.rand(3), first[0])
    assert torch.equal(torch.rand(2), drawn)


def test_moves_are_made_in_the_running_process_and_undone_at_the_end() -> None:
    before = sorted(os.sched_getaffinity(0)), torch.get_num_threads()
    events = []
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    policy = Policy(kind="greedy")
    with Swan(EngineConfig(policy=policy, nice=0), on_event=events.append) as swan:
        with swan.training(optimizer=optimizer, model=model) as task:
            core = swan.topology.cores[0]
            swan.force(Choice((1,), (core,)))
            model(torch.zeros(4, 8)).sum().backward()
            optimizer.step()
            assert os.sched_getaffinity(0) == {core}
            assert torch.get_num_threads() == 1
            assert all(os.sched_getaffinity(t) == {core} for t in threads() if t in threads())
            with pytest.raises(ConfigError, match="diverged"):
                task.step_end(loss=math.nan)
        assert swan.status()["applied"] == [core]
    assert (sorted(os.sched_getaffinity(0)), torch.get_num_threads()) == before
    assert {event["kind"] for event in events} == {"move", "error"}


def test_pause_blocks_the_loop_and_saves_first(tmp_path: Path) -> None:
    import threading

    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        Swan(EngineConfig(policy=Policy(kind="fixed"), nice=0, sample_s=0.02)) as swan,
        swan.training(optimizer=optimizer, folder=tmp_path, model=model) as task,
    ):
        swan.pause()
        ended = threading.Event()
        loop = threading.Thread(target=lambda: (task.step_end(), ended.set()))
        loop.start()
        until_s = time.monotonic() + 60
        while not list(tmp_path.glob("step-*.swan")) and time.monotonic() < until_s:
            time.sleep(0.01)
        assert not ended.is_set(), "it waits, and has saved before"
        swan.resume()
        assert ended.wait(60)
        loop.join()
        assert list(tmp_path.glob("step-*.swan"))


def test_two_engines_on_one_host_are_kept_apart(tmp_path: Path) -> None:
    config = EngineConfig(nice=0, lock=str(tmp_path / "lock"))
    with Swan(config), pytest.raises(InfeasibleError, match="another process trains"):
        Swan(config)
    Swan(config).stop()


def test_affinity_changed_from_outside_is_told_and_obeyed() -> None:
    before = sorted(os.sched_getaffinity(0))
    if len(before) < 2:
        pytest.skip("needs two cores")
    with Swan(EngineConfig(policy=Policy(kind="greedy"), nice=0, sample_s=0.02)) as swan:
        assert len(swan.status()["applied"]) == len(before)
        os.sched_setaffinity(os.getpid(), before[:1])
        until_s = time.monotonic() + 60
        while len(swan.status()["applied"]) > 1 and time.monotonic() < until_s:
            time.sleep(0.02)
        assert swan.status()["applied"] == before[:1]
        assert any("from outside" in event["reason"] for event in swan.events)
    assert sorted(os.sched_getaffinity(0)) == before


def test_ignored_affinity_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    with Swan(EngineConfig(policy=Policy(), nice=0, sample_s=30.0)) as swan:
        applied = swan.status()["applied"]
        swan.step_end(0.1)  # the first step has seen the start
        elsewhere = {1: (5.0, max(swan.topology.cores) + 1)}
        monkeypatch.setattr("actors.swan.engine.run_times", lambda root: elsewhere)
        swan._looked = {1: (0.0, 0)}
        swan.step_end(0.1)
        monkeypatch.undo()
        assert any("unenforceable" in event["reason"] for event in swan.events)
        assert swan.status()["applied"] != applied


def test_unplugged_core_is_left(tmp_path: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        pytest.skip("needs two cores")
    online = tmp_path / "devices/system/cpu/online"
    tree(tmp_path, {"devices/system/cpu/online": ",".join(map(str, cores))})
    config = EngineConfig(
        policy=Policy(kind="greedy"), nice=0, sample_s=0.02, sys_root=str(tmp_path)
    )
    with Swan(config) as swan:
        assert len(swan.status()["applied"]) == 2
        online.write_text(f"{cores[0]}\n")
        until_s = time.monotonic() + 60
        while len(swan.status()["applied"]) == 2 and time.monotonic() < until_s:
            time.sleep(0.02)
        assert swan.status()["applied"] == [cores[0]]
