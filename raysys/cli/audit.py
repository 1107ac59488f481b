"""``make audit``: known vulnerabilities and the licences of what is installed here.

The advisories are those of PyPI, asked by ``pip-audit``. A service that cannot be reached, or that
does not know the packages it is asked about, is no good news: the exit code then is 5 and not 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from raysys.errors import CapabilityError, RaysysError, RemoteError

TIMEOUT_S = 900
PIP_AUDIT = (sys.executable, "-m", "pip_audit", "--progress-spinner=off", "--format=json")
# Licences that ask something of whoever passes the software on, or that nobody told.
NOTABLE = ("GPL", "Proprietary", "SSPL", "BUSL", "unknown")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """What the advisory service said.

    Args:
        checked: number of packages that it knows.
        skipped: names of those that it does not.
        findings: one line for each vulnerability.
    """

    checked: int
    skipped: Sequence[str]
    findings: Sequence[str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print both lists; 1 with a known vulnerability, 3 without pip-audit, 5 without an answer."""
    parser = argparse.ArgumentParser(prog="python -m raysys.cli.audit", description=__doc__)
    parser.add_argument("--licences", action="store_true", help="the licences alone, offline")
    options = parser.parse_args(arguments)
    found = licences()
    for name, licence in found.items():
        print(f"{name:<40} {licence}")
    notable = [name for name, text in found.items() if any(word in text for word in NOTABLE)]
    print(f"{len(found)} packages; to look at: {', '.join(notable) or 'none'}")
    if options.licences:
        return 0
    try:
        audit = advisories()
    except RaysysError as error:
        print(f"raysys: error: {error}", file=sys.stderr)
        return error.exit_code
    print("\n".join(audit.findings))
    skipped = f"; not known to the service: {', '.join(audit.skipped)}" if audit.skipped else ""
    print(f"{len(audit.findings)} known vulnerabilities in {audit.checked} packages{skipped}")
    return 1 if audit.findings else 0


def advisories(command: Sequence[str] = (*PIP_AUDIT, "--skip-editable")) -> Audit:
    """Ask the advisory service about every installed package.

    Raises:
        CapabilityError: pip-audit is not installed.
        RemoteError: the service did not answer, or knows none of the packages.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise _silent(f"no answer within {TIMEOUT_S} s") from None
    if "No module named pip_audit" in done.stderr:
        remedy = "pip install 'raysys[audit]'"
        raise CapabilityError("pip-audit", "it is not installed", remedy)
    try:
        report = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        lines = done.stderr.strip().splitlines()
        raise _silent(lines[-1][:200] if lines else f"exit code {done.returncode}") from None
    return _read(report)


def licences() -> dict[str, str]:
    """Licence of every installed package, as its own metadata tells it; sorted by name."""
    found = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name and name != "raysys":
            found[name] = licence_of(distribution.metadata)
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def licence_of(metadata: Any) -> str:
    """The licence expression, else the classifiers, else the first line of the free text."""
    expression = metadata.get("License-Expression")
    if expression:
        return str(expression)
    named = [item for item in metadata.get_all("Classifier") or [] if item.startswith("License ::")]
    last = [item.rpartition(" :: ")[2] for item in named]
    words = "; ".join(item for item in last if item != "OSI Approved")
    free = str(metadata.get("License") or "").strip().partition("\n")[0]
    return words or free[:80] or "unknown"


def _read(report: Sequence[Mapping[str, Any]]) -> Audit:
    known = [item for item in report if "skip_reason" not in item]
    if not known:
        raise _silent("it knows none of the installed packages (is this PyPI itself?)")
    findings = [
        f"{item['name']} {item['version']}: {entry['id']}, mended in "
        f"{', '.join(entry['fix_versions']) or 'no version yet'}"
        for item in known
        for entry in item.get("vulns", ())
    ]
    skipped = [item["name"] for item in report if "skip_reason" in item]
    return Audit(checked=len(known), skipped=skipped, findings=findings)


def _silent(reason: str) -> RemoteError:
    return RemoteError(
        "advisory service", f"NOTHING was audited: {reason}", "Run `make audit` where it is reached"
    )


if __name__ == "__main__":
    raise SystemExit(main())
