"""Who may reach a listener: loopback without ado, other hosts under TLS or by the owner's word.

Keys, tokens, lease tickets and the texts of readers go over these connections, so plain text must
not leave the machine by accident. "plaintext" is for a listener behind a proxy that ends TLS, or
on a network that nobody else can read.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Any

from raysys.config import check
from raysys.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class TlsConfig:
    """Transport of an HTTP listener.

    Args:
        certificate, key: PEM files; with them the listener speaks HTTPS.
        plaintext: allow plain HTTP beyond loopback.
    """

    certificate: str = ""
    key: str = ""
    plaintext: bool = False

    def __post_init__(self) -> None:
        both = bool(self.certificate) == bool(self.key)
        check(self, "key", both, "a key file for the certificate, or neither")


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone; an unknown name cannot tell."""
    bare = host.strip("[]")
    if bare == "localhost" or bare.startswith("unix:"):
        return True
    try:
        return ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return False


def host_of(address: str) -> str:
    """The host of ``host:port`` or ``unix:path``."""
    return address if address.startswith("unix:") else address.rpartition(":")[0]


def check_exposure(host: str, *, encrypted: bool, plaintext: bool, section: str) -> None:
    """Refuse plain text between hosts.

    Args:
        section: of the configuration, for the message; it has ``certificate`` and ``plaintext``.

    Raises:
        ConfigError: the host is not this machine's loopback, and the connection neither encrypted
            nor allowed in plain text.
    """
    if not (encrypted or plaintext or is_loopback(host)):
        raise ConfigError(
            f"{section}.certificate",
            "",
            f"TLS for {host}, which other machines reach",
            f"Give certificates, keep to 127.0.0.1, or set {section}.plaintext=true where TLS "
            "ends in front of it",
        )


def http_options(host: str, port: int, tls: TlsConfig) -> dict[str, Any]:
    """Options of Ray Serve's HTTP proxy.

    Raises:
        ConfigError: plain HTTP beyond loopback that nobody asked for.
    """
    check_exposure(host, encrypted=bool(tls.certificate), plaintext=tls.plaintext, section="tls")
    options: dict[str, Any] = {"host": host, "port": port}
    if tls.certificate:
        options |= {"ssl_certfile": tls.certificate, "ssl_keyfile": tls.key}
    return options


def base_url(host: str, port: int, tls: TlsConfig) -> str:
    """What a client on this machine opens."""
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    if ":" in shown:
        shown = f"[{shown}]"
    return f"{'https' if tls.certificate else 'http'}://{shown}:{port}"
