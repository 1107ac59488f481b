"""Serve an exported click model over HTTP until Ctrl-C: POST {"rows": [{...}]} to it.

raysys embed serve --model model [--set port=8010]
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from actors.fiited.scoring import build_application
from jobs.launcher import Job, JobContext, Summary
from raysys.config import check, check_range


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """An endpoint.

    Args:
        model: folder of ``raysys embed export``. host, port: where it listens. replicas: copies.
        seconds: how long it stays; 0 is until Ctrl-C.
    """

    model: str = ""
    host: str = "127.0.0.1"
    port: int = 8010
    replicas: int = 1
    seconds: float = 0.0

    def __post_init__(self) -> None:
        check(self, "model", bool(self.model), "the folder of an exported model")
        check_range(self, "port", 1, 65535)
        check_range(self, "replicas", 1, 1000)
        check_range(self, "seconds", 0)


def run(config: ServeConfig, context: JobContext) -> Summary:
    """Start Ray Serve, deploy, wait."""
    application = build_application(str(Path(config.model).absolute()), config.replicas)
    context.ray(num_cpus=max(2, config.replicas + 1))
    from ray import serve

    serve.start(http_options={"host": config.host, "port": config.port})
    try:
        serve.run(application, name="embed", route_prefix="/")
        context.console.print(f"scoring at http://{config.host}:{config.port}/ (Ctrl-C ends it)")
        end = time.monotonic() + config.seconds
        while not config.seconds or time.monotonic() < end:
            time.sleep(0.2)
    finally:
        serve.shutdown()
    return Summary(lines=["the endpoint was closed"])


JOB = Job(name="embed serve", config=ServeConfig, run=run, flags=("model", "port"))
