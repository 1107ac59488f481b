"""Issue an enrolment token for a device gateway client, a job server or a gateway."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from actors.venn.security import ROLES, TokenAuthority
from jobs.launcher import Job, JobContext, Summary
from raysys.config import check, check_choice, check_range
from raysys.errors import StorageError


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenConfig:
    """Whose token.

    Args:
        secret: file with the service's secret; subject: name noted in the token.
        role: ``device``, ``job`` or ``gateway``; life_h: hours until it expires.
    """

    secret: str = ""
    subject: str = "edge-1"
    role: str = "device"
    life_h: float = 24.0

    def __post_init__(self) -> None:
        check(self, "secret", bool(self.secret), "a file")
        check_choice(self, "role", ROLES)
        check_range(self, "life_h", 0, low_open=True)


def run(config: TokenConfig, context: JobContext) -> Summary:
    """Print the token and its id."""
    try:
        secret = Path(config.secret).read_bytes().strip()
    except OSError as error:
        raise StorageError(config.secret, error.strerror or str(error), "Create it") from error
    authority = TokenAuthority(secret)
    token = authority.issue(config.subject, config.role, time.time(), 3600 * config.life_h)
    identity = authority.check(token, time.time())["id"]
    return Summary(lines=[token, f"id {identity}: add it to the revocation file to revoke it"])


JOB = Job(name="venn token", config=TokenConfig, run=run)
