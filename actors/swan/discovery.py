"""Which cores this machine has, how fast they are, and which of them we may use.

Clusters come from ``cpu_capacity``, else from the largest clock, else from the core type (hybrid
Intel, ``midr_el1``), else all cores count as equal. Every source may be absent or wrong; what was
missing is noted in the topology.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from actors.swan.sysfs import cpu_list, folders, number, text
from raysys.errors import CapabilityError
from raysys.federated.swan.topology import Topology, group_cores

SYS = Path("/sys")
PROC = Path("/proc")
E_CORE_SPEED = 0.6  # of a hybrid processor's efficiency cores, where only their type is known


def discover(
    sys_root: Path = SYS, proc_root: Path = PROC, allowed: Collection[int] | None = None
) -> Topology:
    """Read the topology.

    Args:
        allowed: cores that the process may use (``os.sched_getaffinity``); None means all.

    Raises:
        CapabilityError: no core is left that is online and allowed.
    """
    notes: list[str] = []
    cpus = sys_root / "devices/system/cpu"
    online = _online(cpus, notes)
    usable = set(online)
    if allowed is not None:
        usable &= set(allowed)
    group = _cgroup(sys_root, proc_root)
    cpuset = _cpuset(group)
    if cpuset:
        usable &= set(cpuset)
    if not usable:
        reason = f"online {online}, allowed {sorted(allowed or [])}, cpuset {list(cpuset)}"
        raise CapabilityError("a usable core", reason, "Widen the affinity or the cpuset")
    cores = sorted(usable)
    capacity = _capacities(sys_root, cpus, cores, notes)
    siblings = [cpu_list(text(cpus / f"cpu{core}/topology/thread_siblings_list")) for core in cores]
    mhz = [(number(cpus / f"cpu{core}/cpufreq/cpuinfo_max_freq") or 0) / 1000 for core in cores]
    clusters = group_cores(
        list(zip(cores, capacity)), [group for group in siblings if len(group) > 1], max(mhz)
    )
    return Topology(
        clusters=clusters,
        quota=_quota(group),
        device=_device(proc_root, clusters),
        notes=tuple(notes),
    )


def gone(topology: Topology, sys_root: Path = SYS) -> tuple[int, ...]:
    """Cores of a topology that have been unplugged since."""
    online = cpu_list(text(sys_root / "devices/system/cpu/online"))
    return tuple(core for core in topology.cores if online and core not in online)


def clock_share(cores: Collection[int], sys_root: Path = SYS) -> float:
    """Least allowed over largest clock of the cores, in (0, 1]; 1 where unknown.

    A cap below the largest clock is the most reliable sign of throttling.
    """
    cpus = sys_root / "devices/system/cpu"
    shares = [1.0]
    for core in cores:
        top = number(cpus / f"cpu{core}/cpufreq/cpuinfo_max_freq")
        cap = number(cpus / f"cpu{core}/cpufreq/scaling_max_freq")
        if top and cap and 0 < cap <= top:
            shares.append(cap / top)
    return min(shares)


def _online(cpus: Path, notes: list[str]) -> tuple[int, ...]:
    online = cpu_list(text(cpus / "online"))
    if online:
        return online
    notes.append("no list of online cores: counted the folders")
    names = [folder.name.removeprefix("cpu") for folder in folders(cpus, "cpu[0-9]*")]
    return tuple(sorted(int(name) for name in names if name.isdigit())) or (0,)


def _capacities(sys_root: Path, cpus: Path, cores: list[int], notes: list[str]) -> list[float]:
    """Relative capacity of each core from the best source that knows all of them."""
    for source in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        values = [number(cpus / f"cpu{core}/{source}") for core in cores]
        found = [value for value in values if value is not None and value > 0]
        if len(found) == len(cores):
            return found
        notes.append(f"no usable {source}")
    atoms = set(cpu_list(text(sys_root / "devices/cpu_atom/cpus")))
    if atoms:
        return [E_CORE_SPEED if core in atoms else 1.0 for core in cores]
    types = [text(cpus / f"cpu{core}/regs/identification/midr_el1") for core in cores]
    if all(types) and len(set(types)) > 1:
        return _by_type([str(kind) for kind in types])
    notes.append("no core types: all cores count as equal")
    return [1.0] * len(cores)


def _by_type(types: list[str]) -> list[float]:
    """Speed by the part number in ``midr_el1``: within Arm's cores a larger one is faster."""

    def part(kind: str) -> int:
        try:
            return (int(kind, 16) >> 4) & 0xFFF
        except ValueError:
            return 0

    order = sorted({part(kind) for kind in types})
    steps = {value: 0.4 + 0.6 * (i + 1) / len(order) for i, value in enumerate(order)}
    return [steps[part(kind)] for kind in types]


def _cgroup(sys_root: Path, proc_root: Path) -> list[Path]:
    """Control group folders of this process, own first, then its parents (version 2, or cpu)."""
    found: list[Path] = []
    for line in (text(proc_root / "self/cgroup") or "").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers not in ("", "cpu", "cpu,cpuacct", "cpuset"):
            continue
        base = sys_root / "fs/cgroup" / controllers
        parts = [part for part in path.split("/") if part not in ("", "..")]
        found += [base.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    return found


def _cpuset(group: list[Path]) -> tuple[int, ...]:
    for folder in group:
        for name in ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus"):
            cores = cpu_list(text(folder / name))
            if cores:
                return cores
    return ()


def _quota(group: list[Path]) -> float:
    """Smallest quota on the way up, in cores; infinite without one."""
    quotas = []
    for folder in group:
        words = (text(folder / "cpu.max") or "").split()
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]):
            quotas.append(int(words[0]) / int(words[1]))
        quota, period = number(folder / "cpu.cfs_quota_us"), number(folder / "cpu.cfs_period_us")
        if quota and period and quota > 0:
            quotas.append(quota / period)
    return min((quota for quota in quotas if quota > 0), default=math.inf)


def _device(proc_root: Path, clusters: tuple[object, ...]) -> str:
    lines = (text(proc_root / "cpuinfo") or "").splitlines()
    named = [
        line.partition(":")[2].strip()
        for line in lines
        if line.startswith(("Hardware", "model name"))
    ]
    shape = "+".join(str(len(getattr(cluster, "cores", ()))) for cluster in clusters)
    return f"{named[-1] if named else platform.machine()} ({shape})"


def with_emulated_speeds(topology: Topology, speeds: dict[int, float]) -> Topology:
    """The topology as if cores had other speeds, for machines that are made unequal on purpose."""
    clusters = group_cores([(core, speeds.get(core, 1.0)) for core in topology.cores])
    return replace(topology, clusters=clusters, device=f"{topology.device}, emulated")
