"""A session on Ray: a private local cluster, or a connection to one that already runs.

A private cluster is never one that happens to run on the machine: its address is always
``"local"``. A given address is probed first, because Ray itself waits for minutes on a dead one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from actors import leaving
from raysys import machine, scratch
from raysys.config import check_range
from raysys.errors import CapabilityError, ConfigError, RemoteError, StorageError

PROBE_TIMEOUT_S = 5.0
NAMESPACE_PREFIX = "raysys"
LOOPBACK = "127.0.0.1"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SessionConfig:
    """How to get a Ray cluster.

    Args:
        address: ``None`` uses ``RAY_ADDRESS`` (set inside a submitted job) or else starts a private
            local Ray; ``"local"`` always starts one; ``"auto"``, ``"host:port"`` or
            ``"ray://host:port"`` connect.
        num_cpus: logical CPUs of a private Ray; ``None`` takes the cores of the machine.
        object_store_mb: object store of a private Ray in MiB.
        dashboard: start the dashboard (loopback only) with a private Ray.
    """

    address: str | None = None
    num_cpus: int | None = None
    object_store_mb: int = 512
    dashboard: bool = False

    def __post_init__(self) -> None:
        check_range(self, "object_store_mb", 80)
        if self.num_cpus is not None:
            check_range(self, "num_cpus", 1)


class Session:
    """An open Ray session; a context manager. ``close`` may be called twice."""

    def __init__(self, namespace: str, *, private: bool, cluster: str | None = None) -> None:
        self.namespace = namespace
        self.private = private
        self._cluster = cluster
        self._open = True

    @classmethod
    def start(cls, config: SessionConfig | None = None) -> Session:
        """Start or join a cluster.

        Raises:
            ConfigError: the address has no usable form.
            RemoteError: nothing answers at the address, or the cluster refuses us.
            CapabilityError: Ray is not installed, a private one cannot start, or an earlier one of
                this process never came to its end.
        """
        config = config or SessionConfig()
        if leaving.is_stuck():
            raise CapabilityError(
                "Ray", "an earlier session of this process never ended", "Start a new process"
            )
        machine.set_thread_environment()
        namespace = f"{NAMESPACE_PREFIX}-{secrets.token_hex(4)}"
        address = resolve_address(config.address)
        if address is None:
            cluster = _start_private(config, namespace)
            return cls(namespace, private=True, cluster=cluster)
        use_token_if_present()
        _connect(address, namespace)
        return cls(namespace, private=False)

    def close(self) -> None:
        """Leave the cluster; a private one is shut down with all its processes.

        Where Ray hangs, this returns all the same and says so (:mod:`actors.leaving`).
        """
        if self._open:
            import ray

            self._open = False
            leaving.leave(ray.shutdown, self._cluster)
            if self._cluster is not None:
                with contextlib.suppress(StorageError):
                    scratch.sweep()  # Ray ends actors by a kill

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def resolve_address(address: str | None) -> str | None:
    """Turn a user's address into one for Ray; None means "start a private cluster".

    Raises:
        ConfigError: not one of the known forms.
        RemoteError: ``"auto"`` and no cluster is known on this machine, or nothing listens.
    """
    if address is None:
        address = machine.cluster_address() or "local"
    if address == "local":
        return None
    if address == "auto":
        address = machine.cluster_address() or _last_cluster()
    host, port = split_address(address)
    _probe(address, host, port)
    return address


def split_address(address: str) -> tuple[str, int]:
    """Split ``[ray://|http://]host:port``.

    Raises:
        ConfigError: there is no port, or it is not in [1, 65535].
    """
    bare = address.split("://", 1)[-1].rstrip("/")
    host, separator, port = bare.rpartition(":")
    if not separator or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(
            "address", address, "'local', 'auto', 'host:port' or 'ray://host:port'", ""
        )
    return host.strip("[]"), int(port)


def use_token_if_present() -> bool:
    """Switch this process to token authentication when a token is on the machine.

    Ray's own job client does not look for the token file that an earlier ``ray.init`` left, while a
    head started after it demands the token. The user's own ``RAY_AUTH_MODE`` is never overridden.

    Returns:
        Whether this process now authenticates with a token.
    """
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode is None and machine.has_ray_token():
        os.environ["RAY_AUTH_MODE"] = "token"
        mode = "token"
    return mode == "token"


def _start_private(config: SessionConfig, namespace: str) -> str:
    """Start a private Ray and return the name of its session."""
    # Ray runs workers at nice 15; on a shared machine they then starve beside anything else.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray = _import_ray()
    temp = machine.temp_dir()
    options: dict[str, Any] = {"_temp_dir": str(temp)} if temp else {}
    try:
        with _loopback_only():
            ray.init(
                address="local",
                namespace=namespace,
                num_cpus=config.num_cpus,
                object_store_memory=config.object_store_mb * 2**20,
                include_dashboard=config.dashboard,
                dashboard_host=LOOPBACK,
                _node_ip_address=LOOPBACK,
                logging_level="error",
                log_to_driver=False,
                **options,
            )
    except (RuntimeError, OSError, ValueError) as error:
        raise CapabilityError(
            "a private Ray", str(error).split("\n", 1)[0], "See `raysys doctor`"
        ) from error
    return str(ray.get_runtime_context().get_session_name())


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """Let a Ray that starts inside the block listen on loopback alone.

    On macOS and Windows Ray does so by itself; on Linux it listens on every interface and turns
    a loopback node address into the machine's own, unless this switch is off. This process read it
    when it imported Ray, and the processes that Ray starts read it from their environment.
    """
    from ray._private import ray_constants

    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    value, variable = ray_constants.ENABLE_RAY_CLUSTER, os.environ.get(name)
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ[name] = "0"
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = value
        if variable is None:
            del os.environ[name]
        else:
            os.environ[name] = variable


def _connect(address: str, namespace: str) -> None:
    ray = _import_ray()
    try:
        ray.init(address=address, namespace=namespace, logging_level="error", log_to_driver=False)
    except (ConnectionError, RuntimeError, OSError, ValueError, ray.exceptions.RayError) as error:
        reason = str(error).split("\n", 1)[0]
        raise RemoteError(f"Ray cluster {address}", reason, _TOKEN_HINT) from error


_TOKEN_HINT = (
    "If the cluster uses token authentication, set RAY_AUTH_MODE=token and give the "
    "cluster's token in RAY_AUTH_TOKEN or ~/.ray/auth_token"
)


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise CapabilityError("Ray", str(error), "Run `make setup`") from error
    return ray


def _last_cluster() -> str:
    """Address that a running head noted on this machine."""
    note = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    try:
        return note.read_text(encoding="utf-8").strip()
    except OSError:
        raise RemoteError(
            "Ray cluster auto",
            "no cluster is known on this machine",
            "Start one with `ray start --head`, or leave --address out for a private one",
        ) from None


def _probe(address: str, host: str, port: int) -> None:
    try:
        socket.create_connection((host, port), timeout=PROBE_TIMEOUT_S).close()
    except OSError as error:
        reason = f"nothing answers at {host}:{port} ({error.strerror or error})"
        raise RemoteError(
            f"Ray cluster {address}", reason, "Check the address, or leave --address out"
        ) from None
