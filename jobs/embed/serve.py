"""Serve an exported click model over HTTP until Ctrl-C: POST {"rows": [{...}]} to it.

raysys embed serve --model model [--set port=8010]
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from actors.fiited.scoring import build_application
from actors.listeners import TlsConfig, base_url, http_options
from jobs.launcher import Job, JobContext, Summary
from raysys.config import check, check_range


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """An endpoint.

    Args:
        model: folder of ``raysys embed export``. host, port: where it listens.
        tls: certificates, needed beyond loopback. replicas: copies.
        seconds: how long it stays; 0 is until Ctrl-C.
    """

    model: str = ""
    host: str = "127.0.0.1"
    port: int = 8010
    tls: TlsConfig = field(default_factory=TlsConfig)
    replicas: int = 1
    seconds: float = 0.0

    def __post_init__(self) -> None:
        check(self, "model", bool(self.model), "the folder of an exported model")
        check_range(self, "port", 1, 65535)
        check_range(self, "replicas", 1, 1000)
        check_range(self, "seconds", 0)


def run(config: ServeConfig, context: JobContext) -> Summary:
    """Start Ray Serve, deploy, wait."""
    options = http_options(config.host, config.port, config.tls)
    application = build_application(str(Path(config.model).absolute()), config.replicas)
    context.ray(num_cpus=max(2, config.replicas + 1))
    from ray import serve

    serve.start(http_options=options)
    try:
        serve.run(application, name="embed", route_prefix="/")
        context.console.print(
            f"scoring at {base_url(config.host, config.port, config.tls)}/ (Ctrl-C ends it)"
        )
        end = time.monotonic() + config.seconds
        while not config.seconds or time.monotonic() < end:
            time.sleep(0.2)
    finally:
        serve.shutdown()
    return Summary(lines=["the endpoint was closed"])


JOB = Job(name="embed serve", config=ServeConfig, run=run, flags=("model", "port"))
