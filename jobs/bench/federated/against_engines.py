"""The same job through other engines' public APIs, each in an environment that this file makes.

Rivals' pins exclude ours (Flower wants an older protobuf and Ray, pfl an older accountant), so each
gets a virtual environment in the cache folder; torch, NumPy and psutil come from ours by a path
file, so that both sides run the very same arithmetic.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from jobs.bench.federated.on_ray import SPEC, digits_population, federated_run
from raysys import machine, scratch
from raysys.bench import Claim, Profile, paired_claim
from raysys.errors import CapabilityError
from raysys.federated.core.datasets import load_digits_data
from raysys.federated.core.model import Cnn, ModelSpec

POPULATION, PER_ROUND = 1000, 100
REQUIREMENTS = {"flower": "flwr[simulation]==1.42.0", "pfl": "pfl==0.6.0"}
CNN = ModelSpec(architecture=Cnn(image=(1, 8, 8), channels=(8, 16)))
SPECS = {"mlp": SPEC, "cnn": CNN}
TIMEOUT_S = 1200


def vs_flower(profile: Profile) -> Claim:
    """Clients per CPU second of the process tree, against Flower's simulation: MLP and CNN."""
    return _against(
        "flower", profile, rounds={"mlp": profile.pick(1, 3), "cnn": profile.pick(1, 3)}
    )


def vs_pfl(profile: Profile) -> Claim:
    """Clients per CPU second of the process tree, against pfl-research's backend: MLP and CNN."""
    return _against(
        "pfl", profile, rounds={"mlp": profile.pick(10, 30), "cnn": profile.pick(4, 12)}
    )


def _against(rival: str, profile: Profile, rounds: dict[str, int]) -> Claim:
    python = environment(rival)
    repeats = profile.pick(1, 3)
    rates: dict[str, dict[str, list[float]]] = {}
    for kind, spec in SPECS.items():
        ours, theirs = [], []
        for _ in range(repeats):
            ours.append(_ours(spec, kind, profile.pick(60, 200) if kind == "mlp" else 20))
            theirs.append(_theirs(python, rival, kind, rounds[kind]))
        rates[kind] = {
            "ours": ours,
            rival: theirs,
            "ratio": [mine / other for mine, other in zip(ours, theirs)],
        }
    return paired_claim(
        f"vs_{rival}",
        "clients per CPU second of the process tree, MLP",
        "higher",
        ours=rates["mlp"]["ours"],
        baseline_name=REQUIREMENTS[rival],
        baseline=rates["mlp"][rival],
        seeds=[0],
        extra={"cnn": rates["cnn"], "cnn_ratio": statistics.median(rates["cnn"]["ratio"])},
    )


def environment(rival: str) -> Path:
    """The Python of a rival's environment, made on first use.

    Raises:
        CapabilityError: it cannot be installed here.
    """
    folder = machine.cache_dir() / "bench-environments" / f"{rival}-{sys.version_info[1]}"
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if not ready.is_file() or ready.read_text(encoding="utf-8") != REQUIREMENTS[rival]:
        try:
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
            pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, REQUIREMENTS[rival]], check=True, timeout=TIMEOUT_S)
        except (subprocess.SubprocessError, OSError) as error:
            raise CapabilityError(
                rival, f"its environment cannot be made ({error})", "Give pip access to an index"
            ) from error
        ready.write_text(REQUIREMENTS[rival], encoding="utf-8")
    # What it shares with us comes from the environment that runs now: the one that made it may be
    # gone.
    own = next((folder / "lib").glob("python3*/site-packages"))
    base = sysconfig.get_path("purelib")
    (own / "zz_raysys_base.pth").write_text(f"{base}\n", encoding="utf-8")
    return python


def _theirs(python: Path, rival: str, kind: str, rounds: int) -> float:
    program = Path(__file__).parent / "rivals" / f"{rival}_job.py"
    data = load_digits_data(0, image=True)
    population = digits_population(POPULATION, len(data.targets))
    with scratch.folder("federated") as folder:
        job = folder / "job.npz"
        rows = population.sample_ids.reshape(POPULATION, -1).astype(np.int64)
        np.savez(job, inputs=data.inputs, targets=data.targets, rows=rows)
        done = subprocess.run(
            [str(python), str(program), str(job), kind, str(rounds)],
            capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd=folder,
        )  # fmt: skip
    line = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    if done.returncode or not line.startswith("{"):
        tail = done.stderr.strip().splitlines()[-3:]
        raise CapabilityError(rival, f"its job failed: {tail}", "Look at rivals/ in jobs/bench")
    figures: dict[str, Any] = json.loads(line)
    return float(figures["clients"] / figures["cpu_s"])


def _ours(spec: ModelSpec, kind: str, rounds: int) -> float:
    """Our rate over Ray with two workers, by the CPU time of coordinator, workers and driver."""
    with federated_run(PER_ROUND, workers=2, slice_s=60.0, spec=spec, image=kind == "cnn") as run:
        list(run.rounds(3))
        before = _tree_cpu_s()
        list(run.rounds(3 + rounds, have=3))
        return rounds * PER_ROUND / (_tree_cpu_s() - before)


def _tree_cpu_s() -> float:
    """CPU seconds of this process and all below it: Ray's own processes included."""
    me = psutil.Process()
    total = 0.0
    for process in [me, *me.children(recursive=True)]:
        try:
            spent = process.cpu_times()
        except psutil.Error:
            continue  # it ended between the list and the look
        total += spent.user + spent.system + spent.children_user + spent.children_system
    return total
