"""Measure a system's claims side by side with its baselines.

    python -m jobs.bench SYSTEM [--profile quick|full] [--only CLAIM] [--json PATH]
                                [--partial FOLDER]

Writes JSON (``-`` is standard output) as ``raysys/bench.py`` describes. It never judges itself.
A claim that fails is named under ``config.failed``, the others go on, and the exit code is not 0.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import pkgutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from jobs import bench as package
from raysys import machine, scratch
from raysys.bench import Claim, ClaimFunction, Profile, result_to_dict
from raysys.errors import CapabilityError, ConfigError, RaysysError
from raysys.runs.storage import Storage


class Measured(NamedTuple):
    """A system's JSON object, and the exit code of its first failed claim (0: none)."""

    result: dict[str, Any]
    exit_code: int


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


def measure(system: str, profile: Profile, only: Sequence[str], console: Console) -> Measured:
    """Measure one system; a claim that fails is noted, and the others are measured.

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
    notes: dict[str, dict[str, Any]] = {"skipped": {}, "failed": {}, "seconds": {}}
    code = 0
    for name in only or claims:
        console.print(f"{system}: {name} ...")
        begun = time.monotonic()
        try:
            done.append(claims[name](profile))
            console.print(f"{system}: {_describe(done[-1])}")
        except CapabilityError as error:
            notes["skipped"][name] = str(error)
            console.print(f"{system}: {name}: {error}", markup=False)
        except Exception as error:  # hours of other claims must not be lost for one
            notes["failed"][name] = f"{type(error).__name__}: {error}"
            code = code or getattr(error, "exit_code", 1)
            console.print(f"{system}: {name} failed: {error}", markup=False)
            if not isinstance(error, RaysysError):
                traceback.print_exc()
        notes["seconds"][name] = round(time.monotonic() - begun, 1)
    config = {**module.CONFIG, **notes}
    duration_s = time.monotonic() - started
    result = result_to_dict(system, profile, done, config, machine.describe(), duration_s)
    return Measured(result, code)


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
    result: Any
    try:
        if options.system == "all" and options.only:
            raise ConfigError("--only", options.only, "nothing with all", "Name one system")
        with _only_json_on_stdout():
            if options.system == "all":
                result, code = _all(options)
            else:
                result, code = measure(options.system, profile, options.only, console)
        if options.json == "-":
            print(_text(result))
        elif options.json:
            _write(result, options.json)
    except RaysysError as error:
        print(f"raysys: error: {error}", file=sys.stderr)
        return error.exit_code
    return code


def _all(options: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """Every system in a process of its own, which gives back its memory and may die alone."""
    results: list[dict[str, Any]] = []
    code = 0
    with scratch.folder("bench") as folder:
        for name in systems():
            path = folder / f"{name}.json"
            ended = subprocess.run(_command(name, options, path), check=False).returncode
            code = code or ended
            if path.is_file():
                results.append(json.loads(path.read_text(encoding="utf-8")))
            else:
                config = {"failed": {"all claims": f"its process ended with code {ended}"}}
                profile = Profile(name=options.profile)
                results.append(result_to_dict(name, profile, [], config, machine.describe(), 0.0))
            if options.json and options.json != "-":
                _write(results, options.json)  # what is known so far
    return results, code


def _command(system: str, options: argparse.Namespace, target: Path) -> list[str]:
    words = [sys.executable, "-m", "jobs.bench", system, "--profile", options.profile]
    return [*words, "--json", str(target), "--partial", options.partial]


def _text(result: Any) -> str:
    return json.dumps(result, indent=2, allow_nan=False)


def _write(result: Any, target: str) -> None:
    path = Path(target).absolute()
    Storage(str(path.parent)).write(path.name, f"{_text(result)}\n".encode())


@contextlib.contextmanager
def _only_json_on_stdout() -> Iterator[None]:
    """What engines and child processes print goes to standard error in the meantime."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


if __name__ == "__main__":
    raise SystemExit(main())
