"""Who may call what: TLS, mutual TLS, and signed enrolment tokens with expiry and revocation."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from actors.listeners import check_exposure, host_of
from actors.venn.status import DecodeInterceptor
from raysys.config import check
from raysys.credentials import SECRET, revealed
from raysys.errors import ConfigError, StorageError
from raysys.federated.core.tickets import LeaseSeal

ROLES = ("device", "job", "gateway")
ROLE_OF_SERVICE = {
    "/raysys.venn.v1.DeviceGateway/": "device",
    "/raysys.venn.v1.JobPlane/": "job",
    "/raysys.venn.v1.PlanFeed/": "gateway",
    "/raysys.edge.v1.EdgePlane/": "device",
    "/raysys.swan.v1.SwanDevice/": "job",
}
_HEADER = "authorization"


@dataclass(frozen=True, kw_only=True, slots=True)
class SecurityConfig:
    """Transport and identity; all paths are PEM files, empty means off.

    Args:
        certificate, key: of this server.
        authority: certificates that callers (mutual TLS) or servers (client side) must chain to.
        mutual: callers must show a certificate.
        token_secret: file with at least 32 bytes; when given, every call needs a token.
        revoked: file with one revoked token id per line; read again when it changes.
        token: what this process itself sends, or ``file:PATH``.
        plaintext: allow connections beyond loopback without TLS.
    """

    certificate: str = ""
    key: str = ""
    authority: str = ""
    mutual: bool = False
    token_secret: str = ""
    revoked: str = ""
    token: str = field(default="", repr=False, metadata=SECRET)
    plaintext: bool = False

    def __post_init__(self) -> None:
        both = bool(self.certificate) == bool(self.key)
        check(self, "key", both, "a key file for the certificate, or neither")
        check(self, "authority", bool(self.authority) or not self.mutual, "a file under mutual TLS")
        complete = bool(self.certificate) or not self.mutual
        check(self, "certificate", complete, "a file under mutual TLS")


@dataclass(slots=True)
class TokenAuthority:
    """Issues and checks tokens; a token is ``base64(claims).base64(HMAC-SHA256)``."""

    secret: bytes
    revoked_path: Path | None = None
    _revoked: frozenset[str] = frozenset()
    _stamp: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        if len(self.secret) < 32:
            raise ConfigError("token_secret", len(self.secret), "at least 32 bytes")

    def issue(self, subject: str, role: str, now_s: float, life_s: float) -> str:
        """A token for one subject and role, valid for ``life_s`` seconds of wall-clock time.

        Raises:
            ConfigError: unknown role, or a life that is not positive.
        """
        if role not in ROLES:
            raise ConfigError("role", role, "one of " + ", ".join(ROLES))
        if not life_s > 0:
            raise ConfigError("life_s", life_s, "a positive number of seconds")
        claims = {"sub": subject, "role": role, "exp": now_s + life_s, "id": secrets.token_hex(8)}
        body = _encode(json.dumps(claims, separators=(",", ":")).encode())
        return f"{body}.{_encode(self._sign(body))}"

    def check(self, token: str, now_s: float) -> dict[str, Any]:
        """The claims of a valid token.

        Raises:
            ConfigError: malformed, forged, expired or revoked.
        """
        body, _, signature = token.partition(".")
        try:
            genuine = hmac.compare_digest(_decode(signature), self._sign(body))
            claims = json.loads(_decode(body)) if genuine else {}
        except ValueError:
            genuine, claims = False, {}
        if not genuine:
            raise ConfigError("token", "(hidden)", "a token of this service")
        if now_s >= float(claims["exp"]):
            raise ConfigError("token", "(hidden)", "a token that has not expired", "Enrol again")
        if claims["id"] in self._revocations():
            raise ConfigError("token", "(hidden)", "a token that was not revoked")
        return dict(claims)

    def _revocations(self) -> frozenset[str]:
        if self.revoked_path is None:
            return self._revoked
        try:
            status = self.revoked_path.stat()
            stamp = (status.st_mtime_ns, status.st_size)
            if stamp != self._stamp:
                self._revoked = frozenset(self.revoked_path.read_text(encoding="utf-8").split())
                self._stamp = stamp
        except FileNotFoundError:
            pass
        return self._revoked

    def _sign(self, body: str) -> bytes:
        return hmac.new(self.secret, body.encode(), hashlib.sha256).digest()


@dataclass(eq=False)
class TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses calls without a valid token of the right role; health and reflection stay open."""

    authority: TokenAuthority
    clock: Callable[[], float]
    refused: int = field(default=0)

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: Any
    ) -> Any:
        role = next(
            (role for prefix, role in ROLE_OF_SERVICE.items() if details.method.startswith(prefix)),
            None,
        )
        if role is None:
            return await continuation(details)
        header = dict(details.invocation_metadata).get(_HEADER, "")
        try:
            claims = self.authority.check(str(header).removeprefix("Bearer "), self.clock())
        except ConfigError as error:
            self.refused += 1
            return _refusal(await continuation(details), "UNAUTHENTICATED", str(error))
        if claims["role"] != role:
            self.refused += 1
            reason = f"this call needs the role {role}, the token has {claims['role']}"
            return _refusal(await continuation(details), "PERMISSION_DENIED", reason)
        return await continuation(details)


def server_port(server: Any, address: str, config: SecurityConfig) -> int:
    """Bind ``address`` with the configured transport; returns the port.

    Raises:
        StorageError: a certificate file cannot be read.
        ConfigError: plain text beyond loopback that nobody asked for.
    """
    check_address(address, config, bool(config.certificate))
    if not config.certificate:
        return int(server.add_insecure_port(address))
    roots = _file(config.authority) if config.mutual else None
    pair = [(_file(config.key), _file(config.certificate))]
    credentials = grpc.ssl_server_credentials(pair, roots, config.mutual)
    return int(server.add_secure_port(address, credentials))


def interceptors(config: SecurityConfig, clock: Callable[[], float]) -> list[Any]:
    """Interceptors of a server under this configuration."""
    if not config.token_secret:
        return [DecodeInterceptor()]
    revoked = Path(config.revoked) if config.revoked else None
    authority = TokenAuthority(_file(config.token_secret).strip(), revoked)
    return [TokenInterceptor(authority, clock), DecodeInterceptor()]


def lease_seal(config: SecurityConfig) -> LeaseSeal | None:
    """What signs and checks lease tickets; None in a deployment without a token secret.

    Raises:
        StorageError: the secret cannot be read. ConfigError: it is too short.
    """
    return LeaseSeal(_file(config.token_secret).strip()) if config.token_secret else None


def channel(address: str, config: SecurityConfig, limit_bytes: int = 64 * 2**20) -> Any:
    """An asyncio channel that reconnects quickly.

    Raises:
        ConfigError: plain text to another host that nobody asked for.
    """
    check_address(address, config, bool(config.authority))
    options = [
        ("grpc.initial_reconnect_backoff_ms", 50),
        ("grpc.min_reconnect_backoff_ms", 50),
        ("grpc.max_reconnect_backoff_ms", 250),
        ("grpc.max_receive_message_length", limit_bytes),
        ("grpc.max_send_message_length", limit_bytes),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if not config.authority:
        return grpc.aio.insecure_channel(address, options)
    key = _file(config.key) if config.key else None
    chain = _file(config.certificate) if config.certificate else None
    credentials = grpc.ssl_channel_credentials(_file(config.authority), key, chain)
    return grpc.aio.secure_channel(address, credentials, options)


def listening_context(config: SecurityConfig) -> ssl.SSLContext | None:
    """TLS of a listener that is not gRPC; None without a certificate.

    Raises:
        StorageError: a certificate file cannot be read.
    """
    if not config.certificate:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load(context, config)
    if config.mutual:
        context.load_verify_locations(cadata=_file(config.authority).decode())
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def calling_context(config: SecurityConfig) -> ssl.SSLContext | None:
    """TLS of a caller to such a listener; None without an authority to check it against.

    Raises:
        StorageError: a certificate file cannot be read.
    """
    if not config.authority:
        return None
    context = ssl.create_default_context(cadata=_file(config.authority).decode())
    if config.certificate:
        _load(context, config)
    return context


def check_address(address: str, config: SecurityConfig, encrypted: bool) -> None:
    """Refuse plain text beyond loopback, unless it was asked for.

    Raises:
        ConfigError: see above.
    """
    plaintext = config.plaintext
    check_exposure(host_of(address), encrypted=encrypted, plaintext=plaintext, section="security")


def metadata(config: SecurityConfig) -> tuple[tuple[str, str], ...]:
    """Call metadata that proves who we are.

    Raises:
        StorageError: the token's file cannot be read. ConfigError: a manifest's hidden token.
    """
    token = revealed(config.token, "security.token")
    return ((_HEADER, f"Bearer {token}"),) if token else ()


def _refusal(handler: Any, code: str, reason: str) -> Any:
    """A handler of the same shape that only refuses."""
    status = grpc.StatusCode[code]

    async def unary(request: Any, context: Any) -> Any:
        await context.abort(status, reason)

    async def stream(request: Any, context: Any) -> Any:
        await context.abort(status, reason)
        yield None

    if handler is None:
        return None
    if handler.request_streaming and handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(stream)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(stream)
    return grpc.unary_unary_rpc_method_handler(unary)


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)


def _load(context: ssl.SSLContext, config: SecurityConfig) -> None:
    try:
        context.load_cert_chain(config.certificate, config.key)
    except (OSError, ssl.SSLError) as error:
        reason = error.strerror or str(error)
        raise StorageError(config.certificate, reason, "Check the security section") from error


def _file(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise StorageError(
            path, error.strerror or str(error), "Check the security section"
        ) from error
