"""Take part in federated training with this device until Ctrl-C; a plain process without Ray."""

from __future__ import annotations

import asyncio
from typing import Any

from actors.edge.agent import DeviceAgent
from actors.edge.config import EdgeDeviceConfig
from jobs.launcher import Job, JobContext, Summary
from raysys.errors import InterruptedRunError


def run(config: EdgeDeviceConfig, context: JobContext) -> Summary:
    """Enrol, check in, train, upload; work in hand stays in the state folder when stopped."""

    def tell(event: dict[str, Any]) -> None:
        context.console.print(f"{event['kind']}: {event['text']}", markup=False)

    agent = DeviceAgent(config, on_event=tell)
    try:
        updates = asyncio.run(_run(agent))
    finally:
        context.run.append_rows("events", agent.device.events)
    context.run.write_json("result.json", {"updates": updates})
    return Summary(lines=[f"{updates} updates sent"])


async def _run(agent: DeviceAgent) -> int:
    try:
        return await agent.run()
    except InterruptedRunError:
        agent.stop()
        raise


JOB = Job(name="device join", config=EdgeDeviceConfig, run=run, flags=("server", "code", "state"))
