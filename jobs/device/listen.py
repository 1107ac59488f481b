"""Let others have this device train what they send, within its owner's wishes, until Ctrl-C."""

from __future__ import annotations

import asyncio
import dataclasses

from actors.edge.config import EdgeDeviceConfig
from actors.edge.control import DeviceControl
from jobs.launcher import Job, JobContext, Summary
from raysys.config import check, check_range


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ListenConfig:
    """A device that is steered from outside.

    Args:
        listen: where; beyond the loopback give ``device.security`` certificates and a token secret.
        duration_s: end after so long; 0 goes on until Ctrl-C.
        device: samples, engine, limits, willingness and state folder of this device.
    """

    listen: str = "127.0.0.1:7720"
    duration_s: float = 0.0
    device: EdgeDeviceConfig = dataclasses.field(default_factory=EdgeDeviceConfig)

    def __post_init__(self) -> None:
        check(self, "listen", ":" in self.listen, "host:port")
        check_range(self, "duration_s", 0)


def run(config: ListenConfig, context: JobContext) -> Summary:
    """Serve; a training in hand stays on disk when stopped."""
    return asyncio.run(_serve(config))


async def _serve(config: ListenConfig) -> Summary:
    control = DeviceControl(config.device)
    host = config.listen.rpartition(":")[0]
    try:
        print(f"device {host}:{await control.start(config.listen)}", flush=True)
        await asyncio.sleep(config.duration_s or float("inf"))
    finally:
        await control.close()
    return Summary(lines=[f"{control.trained} trainings finished"])


JOB = Job(name="device listen", config=ListenConfig, run=run, flags=("listen",))
