"""The launcher: arguments, run directories, exit codes, resume."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.launcher import Job, JobContext, Summary, main
from raysys.config import check_range
from raysys.credentials import SECRET, revealed
from raysys.errors import CapabilityError, InfeasibleError, RaysysError, RemoteError, StorageError
from raysys.runs import RunDirectory


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    rounds: int = 3
    seed: int = 5

    def __post_init__(self) -> None:
        check_range(self, "rounds", 1)


def counting(config: Config, context: JobContext) -> Summary:
    """Count rounds, with a checkpoint after each; stop early when a marker file asks for it."""
    saved = context.run.load_checkpoint() if context.resumed else None
    start = 0 if saved is None else saved[0]
    for step in range(start + 1, config.rounds + 1):
        context.metrics.record("round", step, step=step)
        context.run.save_checkpoint(step, {"state": b"s"})
        if context.run.storage.exists("stop"):
            raise RemoteError("worker 1", "was stopped by the test")
    context.run.write_json("result.json", {"start": start})
    return Summary(lines=[f"counted from {start}"])


def job(run: Callable[[Config, JobContext], Summary] = counting) -> Job[Config]:
    return Job(name="counting", config=Config, run=run, flags=("rounds",))


def test_run_writes_manifest_metrics_and_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert main(job(), ["--run-dir", str(folder), "--rounds", "2"]) == 0
    run = RunDirectory.open(str(folder))
    assert run.manifest.status == "finished"
    assert run.manifest.seeds == [5]
    assert run.manifest.config == {"rounds": 2, "seed": 5}
    assert run.read_table("metrics").column("value").to_pylist() == [1.0, 2.0]
    assert "counted from 0" in capsys.readouterr().out


def test_default_run_directory_is_below_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(job(), []) == 0
    assert len(list((tmp_path / "runs").glob("counting-*/manifest.json"))) == 1


def test_resume_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "stop").touch()
    assert main(job(), ["--run-dir", str(folder), "--set", "rounds=4"]) == RemoteError.exit_code
    assert RunDirectory.open(str(folder)).manifest.status == "failed"
    (folder / "stop").unlink()
    assert main(job(), ["--run-dir", str(folder), "--resume"]) == 0
    run = RunDirectory.open(str(folder))
    assert run.manifest.status == "finished"
    assert run.read_json("result.json") == {"start": 1}
    assert run.read_table("metrics").column("step").to_pylist() == [1, 2, 3, 4]
    assert "worker 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--set", "rounds=0"], 2, "rounds: expected a finite number >= 1, got 0"),
        (["--set", "rounds=x"], 2, "rounds"),
        (["--set", "turns=1"], 2, "turns"),
        (["--config", "absent.yaml"], 6, "absent.yaml"),
        (["--resume"], 2, "--run-dir"),
        (["--run-dir", "absent", "--resume"], 6, "holds no run"),
        (["--run-dir", "nowhere://x"], 6, "not a usable location"),
    ],
)
def test_bad_arguments(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(job(), arguments) == code
    assert text in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_resume_keeps_its_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--run-dir", str(tmp_path / "run")]
    assert main(job(), arguments) == 0
    assert main(job(), [*arguments, "--resume", "--set", "rounds=9"]) == 2
    assert "keeps the configuration" in capsys.readouterr().err
    other = Job(name="other", config=Config, run=counting)
    assert main(other, [*arguments, "--resume"]) == 2


@pytest.mark.parametrize(
    "error",
    [
        CapabilityError("vLLM", "not installed", "Run make setup"),
        InfeasibleError("a budget of 0", "too small"),
        StorageError("/x", "full"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_become_exit_codes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: RaysysError
) -> None:
    def fail(config: Config, context: JobContext) -> Summary:
        raise error

    assert main(job(fail), ["--run-dir", str(tmp_path / "run")]) == error.exit_code
    captured = capsys.readouterr()
    assert str(error) in captured.err
    assert "Traceback" not in captured.err
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["status"] == "failed"
    assert str(error) in manifest["error"]


def test_unexpected_errors_keep_their_trace(tmp_path: Path) -> None:
    def fail(config: Config, context: JobContext) -> Summary:
        raise ZeroDivisionError("boom")

    with pytest.raises(ZeroDivisionError):
        main(job(fail), ["--run-dir", str(tmp_path / "run")])
    assert RunDirectory.open(str(tmp_path / "run")).manifest.status == "failed"


def test_help_lists_fields_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(job(), ["--help"])
    assert stop.value.code == 0
    assert "rounds = 3" in capsys.readouterr().out


def test_unreachable_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def connect(config: Config, context: JobContext) -> Summary:
        context.ray()
        return Summary()

    arguments = ["--run-dir", str(tmp_path / "run"), "--address", "127.0.0.1:9"]
    assert main(job(connect), arguments) == RemoteError.exit_code
    assert "nothing answers at 127.0.0.1:9" in capsys.readouterr().err


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    token: str = dataclasses.field(default="", repr=False, metadata=SECRET)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Guarded:
    code: str = dataclasses.field(default="", repr=False, metadata=SECRET)
    inner: Inner = dataclasses.field(default_factory=Inner)


def guarded(config: Guarded, context: JobContext) -> Summary:
    """Use both secrets, and show the configuration as a careless job would."""
    context.metrics.event("started", config=repr(config))
    context.run.write_json(
        "used.json",
        [len(revealed(config.code, "code")), len(revealed(config.inner.token, "token"))],
    )
    return Summary(lines=[str(config)])


def test_secrets_are_used_but_not_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Not in the manifest, the tables, the output; a secret from a file survives a resume."""
    secret, kept = "s3cret-code", "s3cret-token"
    (tmp_path / "token").write_text(f"{kept}\n")
    job = Job(name="guarded", config=Guarded, run=guarded, flags=("code",))
    folder = tmp_path / "run"
    words = ["--run-dir", str(folder)]
    given = ["--code", secret, "--set", f"inner.token=file:{tmp_path / 'token'}"]
    assert main(job, words + given) == 0
    assert RunDirectory.open(str(folder)).read_json("used.json") == [len(secret), len(kept)]
    files = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    shown = b"".join([*files, "".join(capfd.readouterr()).encode()])
    assert secret.encode() not in shown
    assert kept.encode() not in shown
    assert main(job, [*words, "--resume"]) == 2
    assert "code=file:PATH" in capfd.readouterr().err


def test_an_unreadable_secret_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="Check code"):
        revealed(f"file:{tmp_path / 'absent'}", "code")
    (tmp_path / "odd").write_bytes(b"\xff")
    with pytest.raises(StorageError, match="Check code"):
        revealed(f"file:{tmp_path / 'odd'}", "code")
