"""Measure a system's claims side by side with its baselines.

    python -m jobs.bench SYSTEM [--profile quick|full] [--only CLAIM] [--json PATH]
                                [--partial FOLDER]

Writes JSON (``-`` is standard output) as ``raysys/bench.py`` describes. It never judges itself.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from jobs import bench as package
from raysys import machine
from raysys.bench import Claim, ClaimFunction, Profile, result_to_dict
from raysys.errors import CapabilityError, ConfigError, RaysysError
from raysys.runs.storage import Storage


def systems() -> list[str]:
    """Names of the systems that have a benchmark: what defines ``CLAIMS`` and ``CONFIG``.

    A benchmark is ``jobs/bench/SYSTEM.py`` or, where one file is not enough, a folder
    ``jobs/bench/SYSTEM/`` whose ``__init__.py`` defines both.
    """
    modules = pkgutil.iter_modules(package.__path__)
    return [m.name for m in modules if m.name != "__main__" and _is_benchmark(m.name, m.ispkg)]


def _is_benchmark(name: str, is_folder: bool) -> bool:
    """Whether a module holds a whole benchmark; read as text, so that listing imports nothing."""
    file = f"{name}/__init__.py" if is_folder else f"{name}.py"
    text = (Path(package.__path__[0]) / file).read_text(encoding="utf-8")
    return "\nCLAIMS" in text and "\nCONFIG" in text


def measure(system: str, profile: Profile, only: Sequence[str], console: Console) -> dict[str, Any]:
    """Measure one system.

    Raises:
        ConfigError: no such system or claim.
    """
    known = systems()
    if system not in known:
        raise ConfigError("SYSTEM", system, "one of " + ", ".join([*known, "all"]))
    module = importlib.import_module(f"{package.__name__}.{system}")
    claims: Mapping[str, ClaimFunction] = module.CLAIMS
    for name in only:
        if name not in claims:
            raise ConfigError("--only", name, "one of " + ", ".join(claims))
    started = time.monotonic()
    done: list[Claim] = []
    skipped: dict[str, str] = {}
    for name in only or claims:
        console.print(f"{system}: {name} ...")
        try:
            claim = claims[name](profile)
        except CapabilityError as error:
            skipped[name] = str(error)
            console.print(f"{system}: {name}: {error}")
            continue
        done.append(claim)
        console.print(f"{system}: {_describe(claim)}")
    config = {**module.CONFIG, "skipped": skipped}
    duration_s = time.monotonic() - started
    return result_to_dict(system, profile, done, config, machine.describe(), duration_s)


def _describe(claim: Claim) -> str:
    text = f"{claim.name} = {claim.value:.4g} {claim.unit}"
    if claim.baseline is None:
        return text
    ratio = "" if claim.ratio is None else f", ratio {claim.ratio:.3g}"
    return f"{text} ({claim.baseline.name}: {claim.baseline.value:.4g}{ratio})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks from the command line and return the exit code."""
    machine.set_thread_environment()
    parser = argparse.ArgumentParser(
        prog="raysys bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("system", metavar="SYSTEM", help=f"all, or one of {', '.join(systems())}")
    parser.add_argument("--profile", choices=("quick", "full"), default="quick")
    parser.add_argument("--only", metavar="CLAIM", action="append", default=[])
    parser.add_argument("--json", metavar="PATH", help="where the JSON goes; - for standard output")
    parser.add_argument(
        "--partial", metavar="FOLDER", default="", help="keep finished pieces here, and go on"
    )
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    profile = Profile(name=options.profile, partial=options.partial)
    try:
        if options.system == "all":
            result: Any = [measure(name, profile, (), console) for name in systems()]
        else:
            result = measure(options.system, profile, options.only, console)
        if options.json:
            _write(result, options.json)
    except RaysysError as error:
        print(f"raysys: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _write(result: Any, target: str) -> None:
    text = json.dumps(result, indent=2, allow_nan=False)
    if target == "-":
        print(text)
    else:
        path = Path(target).absolute()
        Storage(str(path.parent)).write(path.name, f"{text}\n".encode())


if __name__ == "__main__":
    raise SystemExit(main())
