"""The manifest: which job, configuration, seeds, versions and host made a run's results."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from raysys.errors import DataError

MANIFEST_VERSION = 1
Status = Literal["running", "finished", "failed", "interrupted"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Written when a run starts and replaced when it ends.

    Args:
        job: name of the job, such as ``"tour"``.
        config: the job's configuration as plain values.
        seeds: every seed that the job uses.
        host: output of :func:`raysys.machine.describe`.
        status: state of the run.
        started_at: ISO 8601 time with zone.
        ended_at: likewise, or None while it runs.
        error: text of the error that ended it, or None.
    """

    job: str
    config: Mapping[str, Any]
    seeds: Sequence[int]
    host: Mapping[str, Any]
    status: Status
    started_at: str
    ended_at: str | None = None
    error: str | None = None

    def to_json(self) -> bytes:
        """Serialise with the layout's version."""
        fields = {"version": MANIFEST_VERSION, **dataclasses.asdict(self)}
        return json.dumps(fields, indent=2, sort_keys=True).encode()

    @classmethod
    def from_json(cls, content: bytes, path: str) -> Manifest:
        """Parse; ``path`` is for the error text.

        Raises:
            DataError: not JSON, fields are missing, or of another layout version.
        """
        try:
            fields = json.loads(content)
            version = fields.pop("version")
            if version != MANIFEST_VERSION:
                raise DataError(
                    path, f"layout version {version}, this raysys reads {MANIFEST_VERSION}", ""
                )
            return cls(**fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(path, f"damaged manifest ({error})", "Start a new run") from error
