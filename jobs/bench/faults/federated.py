"""The federated core and what is built on it: workers, coordinators and drivers die."""

from __future__ import annotations

import hashlib
from pathlib import Path

from jobs.bench.faults.program import Program, newer_file, shoot
from raysys import scratch
from raysys.bench import Claim, ClaimFunction, Profile
from raysys.federated.core.serialize import unpack_arrays

SEED = 11
PROMISE = "weights and tree of models equal to those of an undisturbed run, bit by bit"
VICTIMS = {"worker": r"^ray::WorkerActor", "coordinator": r"^ray::JobActor"}
COMMON = (
    "rounds=120", "workers=2", "worker_cpus=0", "evaluate_every=0", "checkpoint_every=2",
    "recipe.clients_per_round=40", "recipe.model.hidden=[16]", "recipe.local.epochs=4",
)  # fmt: skip
FAMILY = (
    "family.growth.delta=2", "family.growth.gamma=2", "family.growth.smooth=1",
    "family.growth.beta=10.0", "family.growth.max_models=3", "family.spread=8",
    "recipe.model.hidden=[4]",
)  # fmt: skip
SETTINGS = {
    "federated": COMMON,
    "auxo": (*COMMON, "auxo.k_max=3"),
    "fedtrans": (*COMMON, *FAMILY),
    "fed_ensemble": (*COMMON, "ensemble.k=3"),
}


def digest(folder: Path) -> str:
    """Hash of every model, and of why there are these."""
    found = hashlib.sha256()
    for name, values in sorted(unpack_arrays((folder / "run/model.arrow").read_bytes()).items()):
        found.update(name.encode() + values.tobytes())
    found.update((folder / "run/explain.json").read_bytes())
    return found.hexdigest()


def claim_of(system: str) -> ClaimFunction:
    """The claim of one of the four."""
    settings = SETTINGS[system]
    program = Program(
        system=system, words=("jobs.federate",), settings=lambda folder: settings,
        victims=VICTIMS, sign=newer_file("checkpoints/*"), digest=digest,
    )  # fmt: skip

    def measure(profile: Profile) -> Claim:
        trials, each = profile.pick((1, 3), (8, 3))
        with scratch.folder("faults") as folder:
            return shoot(program, folder, SEED, trials, each).claim(system, PROMISE, SEED)

    return measure
