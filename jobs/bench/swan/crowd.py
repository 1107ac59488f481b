"""Thousands of modelled devices against one real service: enrolment, Venn, tokens, tickets."""

from __future__ import annotations

import asyncio
import secrets
import time
from pathlib import Path
from typing import Any

from actors.edge.config import SamplesConfig
from actors.edge.job import EdgeJobConfig
from actors.edge.server import EdgeServerConfig
from actors.edge.service import EdgeService, VennConfig
from actors.edge.simulated import SimulateConfig, SimulatedFleet
from actors.venn.security import SecurityConfig
from raysys import scratch
from raysys.bench import Baseline, Claim, Profile
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.partition import PartitionConfig
from raysys.federated.core.recipe import FederatedConfig, load_data, make_line
from raysys.federated.venn.scheduler_state import ServiceConfig

CODE = "crowd"


def crowd(profile: Profile) -> Claim:
    """Leases that Venn had to grant for an update that counts; one is as few as can be.

    Service, gateway, scheduler and fleet share this process; every device has a token of its own,
    and every lease the ticket that its gateway signed.
    """
    devices, per_round, rounds = profile.pick((300, 30, 2), (5000, 200, 3))
    with scratch.folder("swan") as folder:
        cpu_s = time.process_time()
        found = asyncio.run(_serve(folder, devices, per_round, rounds))
        cpu_s = time.process_time() - cpu_s
    return Claim(
        name="crowd",
        value=found["leases"] / max(found["accepted"], 1),
        unit="leases per update that counts",
        better="lower",
        baseline=Baseline(name="bound", value=1.0),
        samples={**found, "cpu_s": cpu_s, "rounds": rounds, "per_round": per_round},
        seeds=[0],
    )


async def _serve(folder: Path, devices: int, per_round: int, rounds: int) -> dict[str, Any]:
    secret = folder / "secret"
    secret.write_text(secrets.token_hex(32))
    security = SecurityConfig(token_secret=str(secret))
    venn = VennConfig(
        folder=str(folder / "venn"),
        gateway_address="127.0.0.1:0",
        service=ServiceConfig(low_retry_s=0.5, high_retry_s=10.0),
    )
    recipe = FederatedConfig(
        clients_per_round=per_round,
        partition=PartitionConfig(clients=20),
        local=LocalConfig(epochs=1, batch_size=20, lr=0.1),
    )
    data = load_data(recipe.data, recipe.seed, None)
    service = EdgeService(
        venn, EdgeServerConfig(code=CODE, security=security), devices, time.time()
    )
    try:
        address = await service.start("127.0.0.1:0")
        line = make_line(recipe, recipe.model.spec(data))
        config = EdgeJobConfig(job_id="crowd", clients_per_round=per_round, deadline_s=300.0)
        job = service.add(config, line, recipe.seed, "127.0.0.1")
        fleet = SimulatedFleet(
            SimulateConfig(
                server=address,
                code=CODE,
                count=devices,
                updates=per_round * rounds,
                duration_s=600.0,
                samples=SamplesConfig(split=recipe.partition),
            )
        )
        report, _ = await asyncio.gather(fleet.run(), job.run(rounds))
        assert service.server is not None
        return {
            "devices": report.enrolled,
            "checkins": report.checkins,
            "leases": report.leases,
            "accepted": report.accepted,
            "failed": report.failed,
            "refused_leases": service.server.refused_leases,
            "errors": report.errors,
            "seconds": report.seconds,
            "enrolled_s": report.enrolled_s,
            "repeated_rounds": job.repeats,
        }
    finally:
        await service.close()
