"""Serve a text model over HTTP, OpenAI-compatible, until Ctrl-C.

`raysys serve` starts a private Ray (or uses --address) and listens on loopback; with Ray's own
tool the same application is `serve run jobs.serve:app engine.max_num_seqs=16`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from actors.serving.application import build_application, check_model, check_vllm
from actors.serving.config import ServingConfig
from actors.serving.endpoint import (
    FAILED,
    RUNNING,
    Endpoint,
    application_state,
    check_port,
    first_reason,
)
from jobs.launcher import Job, JobContext, Summary, main
from raysys.config import load_config
from raysys.errors import RemoteError

CHECK_S = 1.0
GRACE_S = 180.0  # a killed engine is replaced; loading it again takes a minute on a small machine


def app(args: Mapping[str, Any]) -> Any:
    """Build the application for ``serve run jobs.serve:app``; arguments are config fields.

    Raises:
        ConfigError: unknown field or wrong value.
        CapabilityError, StorageError, DataError: vLLM or the model is not usable.
    """
    overrides = [f"{name}={value}" for name, value in args.items()]
    return build_application(load_config(ServingConfig, overrides=overrides))


def run(config: ServingConfig, context: JobContext) -> Summary:
    check_port(config.host, config.port)
    check_vllm()
    check_model(config.model)
    context.ray(num_cpus=max(2, config.fleet.max_replicas or config.replicas))
    tell = context.console.print
    with Endpoint.start(config, report=lambda text: tell(f"{text} ...")):
        tell(f"serving {config.model.name} at {config.url} (Ctrl-C ends it)")
        context.metrics.event("ready", url=config.url)
        watch(context)
    return Summary()


def watch(context: JobContext, grace_s: float = GRACE_S) -> None:
    """Look after the endpoint until the job is interrupted.

    Raises:
        RemoteError: a failed engine did not come back within ``grace_s`` seconds.
    """
    failed_since: float | None = None
    while True:
        state, message = application_state()
        if state == RUNNING:
            if failed_since is not None:
                context.console.print("the engine is back")
            failed_since = None
        elif failed_since is None:
            failed_since = time.monotonic()
            context.metrics.event("engine lost", state=state, message=message)
            context.console.print(f"the engine is {state}; Ray Serve is replacing it")
        elif time.monotonic() - failed_since > grace_s and state in FAILED:
            raise RemoteError("serving engine", first_reason(message), "See the Ray Serve logs")
        time.sleep(CHECK_S)


JOB = Job(name="serve", config=ServingConfig, run=run)

if __name__ == "__main__":
    raise SystemExit(main(JOB))
