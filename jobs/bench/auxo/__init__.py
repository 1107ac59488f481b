"""Claims of Auxo: cohorts found, rivals, restraint, drift, robustness, scale, natural clients.

Planted populations over MNIST at 14x14 (the packaged digits where it is absent): 2,000 clients of
40 samples, 100 a round, 200 rounds, an MLP with 64 hidden units, one local epoch. The quick profile
takes half the clients and rounds, and one seed.
"""

from __future__ import annotations

from typing import Any

from jobs.bench.auxo.contest import (
    ablations,
    ari_seen,
    extra_device_work,
    inner_algorithms,
    one_group_stays_one,
    vs_rivals,
)
from jobs.bench.auxo.natural import natural
from jobs.bench.auxo.runs import INNER, METHODS, PER_ROUND
from jobs.bench.auxo.scale import million_clients, sketch_agreement
from jobs.bench.auxo.stress import drifting, late_group, robustness, unseen

CONFIG: dict[str, Any] = {
    "clients": {"quick": 1000, "full": 2000},
    "rounds": {"quick": 100, "full": 200},
    "clients_per_round": PER_ROUND,
    "samples_per_client": 40,
    "model": "MLP 196-64-10",
    "local": {"epochs": 1, "batch_size": 10, "lr": 0.1},
    "methods": list(METHODS),
    "server_algorithms": list(INNER),
    "scored": "final models on the test set as each client's group sees it, by its own label mix",
    "equal": "device-rounds; CFL and FL+HC pay for the rounds that need everybody",
}

CLAIMS = {
    "ari_seen": ari_seen,
    "one_group_stays_one": one_group_stays_one,
    "extra_device_work": extra_device_work,
    "vs_rivals": vs_rivals,
    "inner_algorithms": inner_algorithms,
    "ablations": ablations,
    "late_group": late_group,
    "drift": drifting,
    "unseen": unseen,
    "robustness": robustness,
    "sketch_agreement": sketch_agreement,
    "million_clients": million_clients,
    "natural": natural,
}
