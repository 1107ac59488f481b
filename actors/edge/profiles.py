"""Step profiles of this device: its own are remembered, those of its kind are asked for and shared.

An own profile is used as it stands until it is a month old; one that other devices agree upon is
verified by the engine first, and a wrong one is reported.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from actors.edge.device import Device
from actors.edge.state import Work
from actors.swan.discovery import discover
from raysys.errors import ConfigError, RemoteError
from raysys.federated.swan.plans import Plan
from raysys.federated.swan.profile import check_plain

KEPT = 16
LIFE_S = 30 * 86_400.0
MOST_BYTES = 65_536


class Profiles:
    """Own and shared profiles of one device."""

    def __init__(self, device: Device) -> None:
        self.device = device
        engine = device.config.engine
        found = discover(Path(engine.sys_root), Path(engine.proc_root))
        self.kind = found.device.replace("|", "/")[:100]

    def key(self, plan: Plan) -> str:
        """Processor, software, model and batch: what a step time depends on."""
        batch = plan.local.batch_size
        return f"{self.kind}|torch {torch.__version__}|{plan.spec.spec_id}|batch {batch}"

    def own(self, key: str) -> dict[str, Any] | None:
        """What this device measured itself, if it is fresh."""
        held = self.device.state.profiles.get(key)
        if held is None or self.device.clock() - held["at_s"] > LIFE_S:
            return None
        return dict(held["profile"])

    def remember(self, key: str, profile: dict[str, Any]) -> None:
        """Keep a profile that this device measured."""
        held = {**self.device.state.profiles}
        held.pop(key, None)
        held[key] = {"at_s": self.device.clock(), "profile": profile}
        self.device.state.profiles = dict(list(held.items())[-KEPT:])

    async def ask(self, work: Work, key: str) -> dict[str, Any] | None:
        """What devices of this kind agree upon; nothing when the server has none, or nonsense."""
        try:
            async with self.device.edge(work.endpoint) as client:
                text = await client.share_profile(key, "")
            plain = json.loads(text) if 0 < len(text) <= MOST_BYTES else None
            if plain is not None:
                check_plain(plain, self.kind)
        except (RemoteError, ConfigError, ValueError, AttributeError) as error:
            self.device.note("profile", f"none is used: {error}")
            return None
        return plain

    async def tell(
        self, work: Work, key: str, profile: dict[str, Any], verified: bool | None
    ) -> None:
        """Remember a fresh profile and share it; report a shared one that did not hold."""
        if not profile["choices"]:
            return
        self.remember(key, profile)
        try:
            async with self.device.edge(work.endpoint) as client:
                if verified is False:
                    await client.share_profile(key, "", wrong=True)
                await client.share_profile(key, json.dumps(profile))
        except RemoteError as error:
            self.device.note("profile", f"not shared: {error}")
