"""Starts and stops the endpoint on a running Ray, and tells in one line why it could not start."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from actors.listeners import http_options
from actors.serving.application import build_application
from actors.serving.config import ServingConfig
from raysys.errors import ConfigError, RemoteError

APPLICATION = "llm"
RUNNING = "RUNNING"
FAILED = ("DEPLOY_FAILED", "UNHEALTHY")


def check_port(host: str, port: int) -> None:
    """Check that a port is free.

    Raises:
        ConfigError: it is taken, or the host is not an address of this machine.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = f"Stop what listens there or choose another with --set port=... ({reason})"
        raise ConfigError("port", f"{host}:{port}", "a free port", remedy) from None


def free_port(host: str = "127.0.0.1") -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


class Endpoint:
    """The served application; a context manager. ``close`` may be called twice."""

    def __init__(self, config: ServingConfig) -> None:
        self.config = config
        self._open = True

    @classmethod
    def start(cls, config: ServingConfig, report: Callable[[str], None] | None = None) -> Endpoint:
        """Start the endpoint on the Ray that this process is connected to, and wait for it.

        Args:
            report: told what is being waited for.

        Raises:
            ConfigError: the port is taken, or plain HTTP beyond loopback that nobody asked for.
            CapabilityError: vLLM is not installed.
            StorageError, DataError: the model is missing or damaged.
            RemoteError: an engine did not come up, or not in time.
        """
        tell = report or (lambda text: None)
        options = http_options(config.host, config.port, config.tls)
        check_port(config.host, config.port)
        tell("checking the model")
        quiet_logs()
        application = build_application(config)
        from ray import serve

        tell("starting the engine")
        serve.start(proxy_location="HeadOnly", http_options=options)
        endpoint = cls(config)
        try:
            _deploy(application)
            endpoint.wait_until_ready(config.start_timeout_s)
        except BaseException:
            endpoint.close()
            raise
        return endpoint

    def wait_until_ready(self, timeout_s: float) -> None:
        """Wait until every deployment runs.

        Raises:
            RemoteError: a deployment failed, or the time is over.
        """
        deadline = time.monotonic() + timeout_s
        while (state := application_state())[0] != RUNNING:
            if state[0] in FAILED:
                raise RemoteError("serving engine", first_reason(state[1]), _START_REMEDY)
            if time.monotonic() > deadline:
                reason = f"not ready after {timeout_s:.0f} s ({state[1] or state[0]})"
                raise RemoteError("serving engine", reason, _START_REMEDY)
            time.sleep(0.2)

    def close(self) -> None:
        """Take the application and the HTTP listener down."""
        if self._open:
            self._open = False
            from ray import serve

            serve.shutdown()

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


_START_REMEDY = "Details are in the logs of Ray Serve, in <Ray session>/logs/serve"


def application_state() -> tuple[str, str]:
    """State and message of the served application; ``("NOT_STARTED", "")`` if there is none."""
    from ray import serve

    status = serve.status().applications.get(APPLICATION)
    if status is None:
        return "NOT_STARTED", ""
    messages = [status.message, *(d.message for d in status.deployments.values())]
    return str(status.status.value), "\n".join(text for text in messages if text)


def first_reason(message: str) -> str:
    """The line of a deployment's message that names the cause: the last one with an error in it."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or "error" in line]
    return (telling or lines or ["no reason was given"])[-1]


def quiet_logs() -> None:
    """Keep request lines of the HTTP client and start-up notices of Ray Serve off the screen."""
    for name in ("httpx", "httpx2", "ray.serve", "vllm"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _deploy(application: Any) -> None:
    from ray import serve
    from ray.serve.schema import LoggingConfig

    target = serve.RunTarget(
        target=application,
        name=APPLICATION,
        route_prefix="/",
        logging_config=LoggingConfig(enable_access_log=False),
    )
    serve.run_many([target], wait_for_applications_running=False)
