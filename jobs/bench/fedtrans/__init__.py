"""FedTrans: what growing a family of models gives on unequal devices, and what each part gives."""

from __future__ import annotations

import dataclasses
from typing import Any

from jobs.bench.fedtrans.arena import CLIENTS, LOCAL, PER_ROUND, SPREAD
from jobs.bench.fedtrans.contest import ablations, vs_rivals
from jobs.bench.fedtrans.convolutional import conv_family
from jobs.bench.fedtrans.exact import (
    distinct_units,
    mixture_constant,
    never_above_capacity,
    preserves,
    reduces_to_fedavg,
)
from raysys.federated.fedtrans.config import FedTransConfig

CONFIG: dict[str, Any] = {
    "clients": CLIENTS,
    "per_round": PER_ROUND,
    "capacity_spread": SPREAD,
    "local": dataclasses.asdict(LOCAL),
    **dataclasses.asdict(FedTransConfig()),
    "accuracy": "mean over clients of the deployed model's, by the client's label mix",
}
CLAIMS = {
    "preserves": preserves,
    "distinct_units": distinct_units,
    "mixture_constant": mixture_constant,
    "never_above_capacity": never_above_capacity,
    "reduces_to_fedavg": reduces_to_fedavg,
    "vs_rivals": vs_rivals,
    "conv_family": conv_family,
    "ablations": ablations,
}
