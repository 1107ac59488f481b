"""Make an authority and certificates for mutual TLS between a service and its devices."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from actors.edge.certificates import make_certificates
from jobs.launcher import Job, JobContext, Summary
from raysys.config import check, check_range


@dataclass(frozen=True, kw_only=True, slots=True)
class CertificatesConfig:
    """What to make.

    Args:
        folder: where; an authority that is there already signs the new ones.
        hosts: names and addresses of the server. devices: client certificates ``device-0`` ...
        days: life of each.
    """

    folder: str = "runs/certificates"
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost")
    devices: int = 1
    days: int = 365

    def __post_init__(self) -> None:
        check(self, "hosts", bool(self.hosts), "at least one host")
        check_range(self, "devices", 0, 100_000)
        check_range(self, "days", 1)


def run(config: CertificatesConfig, context: JobContext) -> Summary:
    """Write the files and say where."""
    names = [f"device-{number}" for number in range(config.devices)]
    folder = make_certificates(Path(config.folder), config.hosts, names, config.days)
    return Summary(lines=[f"authority, server and {len(names)} device certificates in {folder}"])


JOB = Job(name="device certificates", config=CertificatesConfig, run=run)
