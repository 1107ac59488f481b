"""Make an authority and certificates for mutual TLS, for deployments without one of their own."""

from __future__ import annotations

import datetime
import importlib
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raysys.errors import CapabilityError, StorageError

CURVE = "SECP256R1"


def make_certificates(folder: Path, hosts: Sequence[str], names: Sequence[str], days: int) -> Path:
    """Write ``authority.pem``, ``server.pem`` for the hosts, and ``NAME.pem`` for each client.

    Keys stand beside them as ``*.key``, readable by the owner alone. An authority that is there
    already signs the new ones.

    Raises:
        CapabilityError: the package cryptography is not installed.
        StorageError: the folder cannot be written.
    """
    signer = _Signer(days)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        signer.authority(folder)
        signer.leaf(folder, "server", hosts)
        for name in names:
            signer.leaf(folder, name, [])
    except OSError as error:
        raise StorageError(str(folder), error.strerror or str(error), "Choose another") from error
    return folder


class _Signer:
    def __init__(self, days: int) -> None:
        try:
            self.x509 = importlib.import_module("cryptography.x509")
            base = "cryptography.hazmat.primitives"
            self.hashes = importlib.import_module(f"{base}.hashes")
            self.serialization = importlib.import_module(f"{base}.serialization")
            self.ec = importlib.import_module(f"{base}.asymmetric.ec")
        except ImportError as error:
            reason, remedy = "it is not installed", "pip install 'raysys[edge]'"
            raise CapabilityError("cryptography", reason, remedy) from error
        now = datetime.datetime.now(datetime.UTC)
        self.start = now - datetime.timedelta(hours=1)
        self.end = now + datetime.timedelta(days=days)
        self.root_key: Any = None
        self.root: Any = None

    def authority(self, folder: Path) -> None:
        """Load the folder's authority, or make one."""
        pem, key_file = folder / "authority.pem", folder / "authority.key"
        if pem.exists() and key_file.exists():
            self.root = self.x509.load_pem_x509_certificate(pem.read_bytes())
            self.root_key = self.serialization.load_pem_private_key(key_file.read_bytes(), None)
            return
        self.root_key = self._key()
        name = self._name("raysys edge authority")
        constraints = self.x509.BasicConstraints(ca=True, path_length=0)
        self.root = (
            self._builder(name, name, self.root_key)
            .add_extension(constraints, critical=True)
            .sign(self.root_key, self.hashes.SHA256())
        )
        self._write(pem, key_file, self.root, self.root_key)

    def leaf(self, folder: Path, common: str, hosts: Sequence[str]) -> None:
        """A certificate of one server or client."""
        key = self._key()
        builder = self._builder(self._name(common), self.root.subject, key).add_extension(
            self.x509.BasicConstraints(ca=False, path_length=None), critical=True
        )
        if hosts:
            names = self.x509.SubjectAlternativeName([self._host(host) for host in hosts])
            builder = builder.add_extension(names, critical=False)
        certificate = builder.sign(self.root_key, self.hashes.SHA256())
        self._write(folder / f"{common}.pem", folder / f"{common}.key", certificate, key)

    def _builder(self, subject: Any, issuer: Any, key: Any) -> Any:
        return (
            self.x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(self.x509.random_serial_number())
            .not_valid_before(self.start)
            .not_valid_after(self.end)
        )

    def _key(self) -> Any:
        return self.ec.generate_private_key(getattr(self.ec, CURVE)())

    def _name(self, common: str) -> Any:
        oid = self.x509.NameOID.COMMON_NAME
        return self.x509.Name([self.x509.NameAttribute(oid, common)])

    def _host(self, host: str) -> Any:
        try:
            return self.x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            return self.x509.DNSName(host)

    def _write(self, pem: Path, key_file: Path, certificate: Any, key: Any) -> None:
        encoding = self.serialization.Encoding.PEM
        pem.write_bytes(certificate.public_bytes(encoding))
        content = key.private_bytes(
            encoding, self.serialization.PrivateFormat.PKCS8, self.serialization.NoEncryption()
        )
        descriptor = os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
