"""Every command of README.md, docs/ and deploy/ is one that the real command line takes.

Commands of raysys go through the program's own parser and configuration to the end, with the work
itself cut off; cheap ones really run. Ray's go through Ray's parser. What is neither is listed in
``ELSEWHERE`` with the reason.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from jobs import launcher, submit
from jobs.bench import __main__ as bench
from raysys import machine
from raysys.bench import Profile
from raysys.cli import doctor
from raysys.cli.catalogue import find_jobs
from raysys.config import load_config

cli: Any = importlib.import_module("raysys.cli.main")  # the package exports its function
ROOT = machine.app_root()
# The tutorial's commands are of a system that is not here; test_tutorial.py runs them.
PAGES = [
    ROOT / "README.md",
    *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "tutorial.md"),
    ROOT / "cluster.yaml",
    ROOT / "deploy" / "Dockerfile",
    *sorted((ROOT / "deploy").glob("*/*.y*ml")),
]
JOBS = {entry.name for entry in find_jobs(ROOT)}

# What a page writes for something of the reader's own.
PLACEHOLDERS = {
    "HOST:PORT,HOST:PORT": "127.0.0.1:7701,127.0.0.1:7702",
    "HOST:PORT": "127.0.0.1:7701",
    "HOST": "127.0.0.1",
    "<name>": "tour",
    "lte COMMAND": "lte train",
    "device COMMAND": "device join",
    "<system>": "federated",
    "jobs.NAME": "jobs.tour",
    "SYSTEM": "federated",
    "=...": "=127.0.0.1:7701",
}
# Commands that this machine cannot carry out, by how they begin: why.
ELSEWHERE = {
    "ray up": "needs an account at a cloud",
    "ray down": "needs an account at a cloud",
    "ray dashboard": "needs an account at a cloud",
    "kubectl": "needs a Kubernetes cluster",
    "docker": "needs Docker",
    "prometheus": "needs Prometheus; its files are checked by tests/actors/test_dashboards.py",
    "pip install": "changes the environment; `make setup` does it in CI",
    "apt": "changes the machine",
    "curl": "needs a served model; tests/jobs/test_serve_engine.py sends such requests",
    "printf": "the shell's own",
    "openssl": "another program's",
    "export": "the shell's own",
    "source": "the shell's own",
    "cd": "the shell's own",
}
# The shell's words that begin a command line of ours.
STARTS = ("raysys", "python", "make", "ray", "serve", *{key.split()[0] for key in ELSEWHERE})
FAMILIES = ("lte", "embed", "venn", "device", "coreset", "compose")
RAYS = {"start", "stop", "job", "get-auth-token", "status", "memory", "up", "down", "dashboard"}


def commands() -> list[tuple[str, str]]:
    """(where, command) of every command in a code block or in code within a line, once each."""
    found: dict[str, str] = {}
    for page in PAGES:
        for number, line in joined(page.read_text(encoding="utf-8")):
            for text in in_line(line):
                found.setdefault(text, f"{page.name}:{number}")
    return [(where, text) for text, where in found.items()]


def joined(text: str) -> list[tuple[int, str]]:
    """Numbered lines; one that ends with a backslash takes the next along."""
    lines: list[tuple[int, str]] = []
    held, start = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        start = start if held else number
        if line.endswith("\\"):
            held += line[:-1].rstrip() + " "
            continue
        lines.append((start, held + line.strip() if held else line))
        held = ""
    return lines


def in_line(line: str) -> list[str]:
    """Commands of a line: the whole line of a code block, or what stands between backquotes."""
    block = re.fullmatch(rf"(?:#? {{3,}})?((?:{'|'.join(STARTS)})\b.*)", line)
    texts = re.findall(r"`([^`]+)`", line)
    if block is not None and not texts:
        texts = [re.split(r" #|\s{4,}", block[1])[0]]  # less the remark beside it
    return [text.strip() for text in texts if is_command(text.strip())]


def is_command(text: str) -> bool:
    """Whether code is a command, not a path, a module, a table of names or a sentence."""
    words = text.split()
    if elsewhere(text):
        return len(words) > 1
    known = {
        "raysys": lambda: words[1] in {*JOBS, "run", "list", "doctor", "--help"},
        "python": lambda: words[1] == "-m" and words[2].startswith(("jobs.", "raysys.")),
        "ray": lambda: words[1] in RAYS,
        "serve": lambda: words[1] == "run" and len(words) > 2,
        "make": lambda: all(re.fullmatch(r"[a-z][a-z-]*", word) for word in words[1:]),
    }
    return len(words) > 1 and words[0] in known and known[words[0]]()


def filled(text: str) -> list[str]:
    """A command's words, with optional parts left out and the reader's own things filled in."""
    text = re.sub(r"\[(--[^\]]*)\]", "", text)
    text = re.sub(r"\s(-\S+ )?\.\.\.$", "", text)
    for mark, value in PLACEHOLDERS.items():
        text = text.replace(mark, value)
    return [word for word in shlex.split(text) if word != "..."]


class Cut:
    """Stands in for the work; everything before it is real."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached: list[str] = []
        monkeypatch.setattr(launcher, "_run", self.job)
        monkeypatch.setattr(bench, "measure", self.measure)
        monkeypatch.setattr(bench, "_all", self.measure_all)
        monkeypatch.setattr(submit, "submit", self.submitted)
        monkeypatch.setattr(cli, "_start", self.started)
        monkeypatch.setattr(doctor, "CHECKS", (doctor.loopback,))  # all: tests/raysys/test_cli.py

    def job(self, job: launcher.Job[Any], options: argparse.Namespace) -> int:
        flags = [
            f"{name}={value}" for name in job.flags if (value := getattr(options, name)) is not None
        ]
        there = options.config if options.config and Path(options.config).exists() else None
        if options.resume:
            assert options.run_dir
        else:
            load_config(job.config, there, flags + options.set)
        self.reached.append(job.name)
        return 0

    def measure(self, system: str, profile: Profile, only: Sequence[str], console: Any) -> Any:
        assert system in bench.systems()
        claims = importlib.import_module(f"jobs.bench.{system}").CLAIMS
        assert set(only) - {"CLAIM"} <= set(claims), f"{system} has {sorted(claims)}"
        self.reached.append(f"bench {system}")
        return bench.Measured({}, 0)

    def measure_all(self, options: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
        for system in bench.systems():
            self.measure(system, Profile(name=options.profile), (), None)
        return [], 0

    def submitted(self, job: str, arguments: Sequence[str], address: str, *, wait: bool) -> int:
        assert job in JOBS
        return run_job(job, list(arguments))

    def started(self, job: str, arguments: Sequence[str]) -> None:
        raise SystemExit(run_job(job, list(arguments)))


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Cut:
    return Cut(monkeypatch)


def run_job(name: str, words: list[str]) -> int:
    """``python -m jobs.NAME``, in this process."""
    package = ROOT / "jobs" / name.replace(".", "/") / "__main__.py"
    module = importlib.import_module(
        f"jobs.{name}.__main__" if package.exists() else f"jobs.{name}"
    )
    if hasattr(module, "command_line"):
        return int(module.command_line(words))
    if hasattr(module, "JOB"):
        words = module.words(words) if hasattr(module, "words") else words
        return launcher.main(module.JOB, words)
    return int(module.main(words))


def status_of(words: list[str]) -> int:
    """Exit code of ``raysys WORDS``."""
    try:
        return cli.main(words)
    except SystemExit as end:
        return int(end.code or 0)


def targets() -> set[str]:
    text = (ROOT / "Makefile").read_text()
    (names,) = re.findall(r"^\.PHONY: (.+)$", text, re.MULTILINE)
    return set(names.split())


def check_ray(words: list[str]) -> None:
    """Ray's command line takes it; what is submitted is checked in turn."""
    from ray.scripts.scripts import cli as ray_cli

    entrypoint = words[words.index("--") + 1 :] if "--" in words else []
    command: Any = ray_cli
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context(command.name, words, resilient_parsing=False)
    if entrypoint:
        check(entrypoint)


def check(words: list[str]) -> None:
    """The command's own parser takes it."""
    if names_only(words):
        return
    if words[0] == "raysys":
        code = status_of(words[1:])
    elif words[0] == "python":
        code = run_module(words[2], words[3:])
    elif words[0] == "make":
        code = 0 if set(words[1:]) <= targets() else 2
    elif words[0] == "serve":
        from jobs.serve import ServingConfig

        assert words[2] == "jobs.serve:app"
        load_config(ServingConfig, overrides=words[3:])
        code = 0
    else:
        check_ray(words[1:])
        code = 0
    assert code != 2, f"refused: {shlex.join(words)}"


def names_only(words: list[str]) -> bool:
    """Whether a sentence just names a command (`raysys predict`); it must be there."""
    if words[0] not in {"raysys", "ray"} or len(words) > 3 or any("-" in word for word in words):
        return False
    if words[0] == "ray":
        return words[1:] == ["job", "submit"]
    if words[1] in FAMILIES and len(words) == 3:
        return words[2] in importlib.import_module(f"jobs.{words[1]}.__main__").COMMANDS
    return len(words) == 2 and words[1] in JOBS


def run_module(name: str, words: list[str]) -> int:
    head, _, job = name.partition(".")
    if head == "jobs" and job in JOBS:
        try:
            return run_job(job, words)
        except SystemExit as end:
            return int(end.code or 0)
    module = importlib.import_module(name)
    assert callable(module.main)
    return 0


def elsewhere(text: str) -> bool:
    return any(text == key or text.startswith(f"{key} ") for key in ELSEWHERE)


@pytest.mark.filterwarnings("ignore")  # of libraries that benchmarks import
@pytest.mark.parametrize(("where", "text"), commands())
def test_a_documented_command_is_taken(
    where: str, text: str, cut: Cut, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    if not elsewhere(text):
        check(filled(text))


def test_there_are_commands_and_every_reason_is_used() -> None:
    texts = [text for _, text in commands()]
    assert len(texts) > 80
    assert any(text.startswith("raysys federate --config") for text in texts)
    unused = {key for key in ELSEWHERE if not any(text.startswith(key) for text in texts)}
    assert unused == set()


@pytest.mark.parametrize(
    "text",
    [
        "raysys federate --set recipe.clients=3",
        "raysys serve --sett port=1",
        "raysys venn serve --set cluster.gateway=2",
        "raysys bench andes --profile fast",
        "raysys submit tour -- --profle smoke",
        "ray start --heed",
        "python -m jobs.bench nothing",
    ],
)
def test_a_wrong_command_would_be_noticed(
    text: str, cut: Cut, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import click

    monkeypatch.chdir(tmp_path)
    with pytest.raises((AssertionError, click.ClickException)):
        check(filled(text))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_command_of_a_family_has_help(
    family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"jobs.{family}.__main__")
    for name in module.COMMANDS:
        with pytest.raises(SystemExit) as end:
            module.command_line([name, "--help"])
        assert end.value.code == 0
        assert "configuration fields and defaults" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("raysys --help", "raysys runs ten ML systems"),
        ("raysys list", "federate"),
        ("raysys train --set dry_run=true --set data.train_rows=256", "layer modules"),
        ("raysys venn token --set secret=FILE --set role=device --set subject=edge-7", "revoke it"),
        ("raysys device certificates --set folder=certs --set devices=2", "certs"),
        ("raysys report RUN", "report.html"),
    ],
)
def test_cheap_commands_really_run(
    text: str,
    shown: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_bytes(b"x" * 32)
    if "RUN" in text:
        assert launcher.main(importlib.import_module("jobs.train.__main__").JOB,
                             ["--run-dir", "RUN", "--set", "dry_run=true"]) == 0  # fmt: skip
    monkeypatch.setattr(cli, "_start", lambda job, words: (_ for _ in ()).throw(
        SystemExit(run_job(job, list(words)))))  # fmt: skip
    assert status_of(shlex.split(text)[1:]) == 0
    assert shown in capsys.readouterr().out
