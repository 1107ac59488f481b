"""Loopback unless told otherwise, TLS or the owner's word beyond it."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from actors.edge.certificates import make_certificates
from actors.listeners import TlsConfig, base_url, check_exposure, host_of, http_options, is_loopback
from actors.session import Session
from actors.venn.enrolment import Enrolment, Fleet
from actors.venn.security import (
    ROLE_OF_SERVICE,
    SecurityConfig,
    channel,
    metadata,
    server_port,
)
from raysys import machine
from raysys.credentials import HIDDEN
from raysys.errors import ConfigError
from raysys.federated.core.population import population_from_lists

POPULATION = population_from_lists([np.arange(2)] * 4)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "[::1]", "localhost", "unix:/x"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)
    check_exposure(host, encrypted=False, plaintext=False, section="tls")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_beyond_loopback_wants_tls_or_a_word(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(ConfigError, match=r"tls\.plaintext=true"):
        check_exposure(host, encrypted=False, plaintext=False, section="tls")
    check_exposure(host, encrypted=True, plaintext=False, section="tls")
    check_exposure(host, encrypted=False, plaintext=True, section="tls")


def test_hosts_of_addresses() -> None:
    assert [host_of(text) for text in ("a:1", "[::1]:7710", "unix:/tmp/x:1")] == [
        "a",
        "[::1]",
        "unix:/tmp/x:1",
    ]


def test_http_options_and_addresses() -> None:
    https = TlsConfig(certificate="c.pem", key="k.pem")
    assert http_options("127.0.0.1", 1, TlsConfig()) == {"host": "127.0.0.1", "port": 1}
    assert http_options("0.0.0.0", 1, https)["ssl_certfile"] == "c.pem"
    assert base_url("::", 8000, https) == "https://127.0.0.1:8000"
    assert base_url("::1", 8000, TlsConfig()) == "http://[::1]:8000"
    with pytest.raises(ConfigError, match="key"):
        TlsConfig(certificate="c.pem")
    with pytest.raises(ConfigError, match=r"tls\.certificate"):
        http_options("0.0.0.0", 1, TlsConfig())


def test_grpc_stays_home_without_certificates() -> None:
    class NoServer:
        def add_insecure_port(self, address: str) -> int:
            return 7

    assert server_port(NoServer(), "127.0.0.1:0", SecurityConfig()) == 7
    assert server_port(NoServer(), "0.0.0.0:0", SecurityConfig(plaintext=True)) == 7
    with pytest.raises(ConfigError, match=r"security\.certificate"):
        server_port(NoServer(), "0.0.0.0:0", SecurityConfig())
    with pytest.raises(ConfigError, match=r"security\.plaintext"):
        channel("10.0.0.1:7700", SecurityConfig())


@pytest.fixture(scope="module")
def security(tmp_path_factory: pytest.TempPathFactory) -> SecurityConfig:
    folder = tmp_path_factory.mktemp("pem")
    make_certificates(folder, ["127.0.0.1"], ["one"], days=1)
    return SecurityConfig(
        certificate=str(folder / "server.pem"),
        key=str(folder / "server.key"),
        authority=str(folder / "authority.pem"),
        mutual=True,
    )


async def _visit(door: SecurityConfig, caller: SecurityConfig) -> list[Enrolment]:
    """What a job's door received from another job's fleet."""
    mine = Fleet(["127.0.0.1:1"], "p", POPULATION, door)
    other = Fleet(["127.0.0.1:1"], "p", POPULATION, caller)
    guest = Enrolment("00" * 16, "nowhere", 1, 2)
    try:
        endpoint = await mine.start("127.0.0.1")
        await other._send(endpoint, [guest])
        for _ in range(100):
            if arrived := mine.arrived():
                return arrived
            await asyncio.sleep(0.01)
        return []
    finally:
        await other.close()
        await mine.close()


def test_the_door_speaks_tls_and_nothing_else(security: SecurityConfig) -> None:
    assert len(asyncio.run(_visit(security, security))) == 1
    assert asyncio.run(_visit(security, SecurityConfig())) == []


def test_the_door_stays_home_without_certificates() -> None:
    fleet = Fleet([], "p", POPULATION)
    with pytest.raises(ConfigError, match=r"security\.certificate"):
        asyncio.run(fleet.start("0.0.0.0"))


def _listening(pid: int) -> Iterator[tuple[str, str]]:
    """(process, address) of every TCP socket on which a process or its children listen."""
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            for connection in process.net_connections(kind="inet"):
                if connection.status == psutil.CONN_LISTEN:
                    yield process.name(), connection.laddr.ip
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


def test_a_private_ray_listens_on_loopback_alone(ray_session: Session) -> None:
    import ray

    ray.get(ray.remote(lambda: 1).options(num_cpus=0).remote())  # a worker listens too
    found = dict(_listening(os.getpid()))
    assert {"gcs_server", "raylet"} <= set(found)
    outside = {
        name: ip for name, ip in found.items() if not is_loopback(ip.removeprefix("::ffff:"))
    }
    assert outside == {}


def test_certificates_of_the_fixture_are_private(security: SecurityConfig) -> None:
    assert Path(security.key).stat().st_mode & 0o077 == 0


def test_every_service_has_a_role_or_is_meant_to_be_open() -> None:
    """A service that is not in the table would answer strangers in spite of a token secret."""
    found = set()
    for path in (machine.app_root() / "actors" / "proto").glob("*.proto"):
        text = path.read_text(encoding="utf-8")
        (package,) = re.findall(r"^package ([\w.]+);", text, re.MULTILINE)
        found |= {
            f"/{package}.{name}/" for name in re.findall(r"^service (\w+)", text, re.MULTILINE)
        }
    open_to_all = {"/raysys.edge.v1.Enrolment/"}  # asks for the enrolment code itself
    assert found - set(ROLE_OF_SERVICE) == open_to_all


def test_a_token_file_is_read_at_every_call(tmp_path: Path) -> None:
    path = tmp_path / "token"
    config = SecurityConfig(token=f"file:{path}")
    for text in ("first", "second"):
        path.write_text(f"{text}\n")
        assert metadata(config) == (("authorization", f"Bearer {text}"),)
    with pytest.raises(ConfigError, match=r"security\.token"):
        metadata(SecurityConfig(token=HIDDEN))
