"""Swan: the SoC model, real threads on this host, the owner's frames, the fleet, the edge."""

from __future__ import annotations

from jobs.bench.swan.crowd import crowd
from jobs.bench.swan.edge import edge_end_to_end
from jobs.bench.swan.fleet import fleet
from jobs.bench.swan.model import (
    exploration_share,
    long_run,
    model_check_values,
    oracle_gap,
    phone_speedup,
)
from jobs.bench.swan.moves import kills_lose_little, moves_bitwise
from jobs.bench.swan.owner import owner_experience
from jobs.bench.swan.real import real_choice

CONFIG = {
    "phones": "SoC model of five phones; none of its numbers is a measurement of a phone",
    "networks": "CIFAR-size blocks of ResNet, MobileNetV2 and ShuffleNetV2, batch 16, real threads",
    "owner": "16.7 ms period, 40 % of a core, 30 % of the time, a process of its own",
    "edge": "real client processes, mutual TLS, tokens, devices granted by a real Venn service",
}

CLAIMS = {
    "model_check_values": model_check_values,
    "oracle_gap": oracle_gap,
    "exploration_share": exploration_share,
    "phone_speedup": phone_speedup,
    "long_run": long_run,
    "real_choice": real_choice,
    "owner_experience": owner_experience,
    "moves_bitwise": moves_bitwise,
    "kills_lose_little": kills_lose_little,
    "fleet": fleet,
    "crowd": crowd,
    "edge_end_to_end": edge_end_to_end,
}
