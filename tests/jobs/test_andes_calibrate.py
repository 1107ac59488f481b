"""The calibration job: a known machine is found again, and bad logs are refused by name."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from actors.andes.engine_settings import write_status
from jobs.calibrate import JOB, CalibrateConfig, read_step_log, select_steps, words
from jobs.launcher import JobContext, main
from raysys.errors import ConfigError, DataError, StorageError
from raysys.serving.andes.models import StepTime, fit_step_time

TRUE = StepTime(base_s=0.04, per_sequence_s=0.002, per_prefill_token_s=5e-4)


def write_log(path, count=400, noise=0.02, outliers=3):
    rng = np.random.default_rng(1)
    lines = []
    for step in range(count):
        batch, prefill = int(rng.integers(1, 20)), int(rng.integers(0, 200) * (step % 4 == 0))
        seconds = float(TRUE.predict(batch, prefill)) * (1 + noise * rng.standard_normal())
        seconds *= 20.0 if step % 100 == 50 and step // 100 < outliers else 1.0
        lines.append(json.dumps({"batch": batch, "prefill_tokens": prefill,
                                 "context_tokens": 300 * batch, "seconds": seconds}))  # fmt: skip
    path.write_text("\n".join(lines))


def test_job_finds_the_machine_again(tmp_path, capsys):
    log, run = tmp_path / "steps.jsonl", tmp_path / "run"
    write_log(log)
    assert main(JOB, ["--set", f"log={log}", "--run-dir", str(run)]) == 0
    fitted = yaml.safe_load((run / "step_time.yaml").read_text())["step_time"]
    found = StepTime(**fitted)
    assert float(found.predict(10, 0, 3000)) == pytest.approx(float(TRUE.predict(10)), rel=0.03)
    assert fitted["per_prefill_token_s"] == pytest.approx(5e-4, rel=0.1)
    result = json.loads((run / "result.json").read_text())
    assert result["held_out_error"] < 0.05
    assert "per prefill token" in capsys.readouterr().out


def test_slow_outliers_are_trimmed(tmp_path):
    log = tmp_path / "steps.jsonl"
    write_log(log)
    steps = read_step_log(log)
    kept = select_steps(steps, 0, 0.01)
    assert kept[:, 3].max() < 0.5 < steps[:, 3].max()
    fitted, residual = fit_step_time(*kept.T)
    assert residual < fit_step_time(*steps.T)[1]
    assert float(fitted.predict(10, 0, 3000)) == pytest.approx(float(TRUE.predict(10)), rel=0.03)
    assert len(select_steps(steps, 0, 0.0)) == 400


def test_bad_logs_are_refused(tmp_path):
    log = tmp_path / "steps.jsonl"
    good = '{"batch": 1, "prefill_tokens": 0, "context_tokens": 5, "seconds": 0.1}'
    log.write_text(f"{good}\n{good[:30]}")
    assert read_step_log(log).shape == (1, 4)
    log.write_text(f"oops\n{good}")
    with pytest.raises(DataError, match="line 1"):
        read_step_log(log)
    log.write_text(f"{good.replace('0.1', '-1')}\n{good}")
    with pytest.raises(DataError, match="negative"):
        read_step_log(log)
    with pytest.raises(StorageError):
        read_step_log(tmp_path / "absent")
    with pytest.raises(ConfigError, match="bursts"):
        CalibrateConfig(bursts=(0,))


def test_too_few_steps_is_an_error_of_the_log(tmp_path, capsys):
    log = tmp_path / "steps.jsonl"
    write_log(log, count=20)
    assert main(JOB, ["--set", f"log={log}", "--run-dir", str(tmp_path / "run")]) == 6
    assert "usable steps" in capsys.readouterr().err


def test_an_engine_is_loaded_with_every_burst_and_its_steps_are_fitted(monkeypatch, tmp_path):
    sizes = []

    @contextlib.contextmanager
    def start(endpoint, report):
        write_log(Path(endpoint.andes.step_log))
        write_status(Path(endpoint.andes.status_file), {"running": 0, "waiting": 0})
        report("an engine is started")
        yield

    def burst(client, chats):
        sizes.append(len(chats))
        return []

    monkeypatch.setattr(JobContext, "ray", lambda context, **changes: None)
    monkeypatch.setattr("actors.serving.endpoint.Endpoint.start", start)
    monkeypatch.setattr("actors.serving.client.ChatClient.burst", burst)
    monkeypatch.setattr("actors.serving.client.require_complete", lambda streams: None)
    run = tmp_path / "run"
    options = words(["serving", "--set", "bursts=[1, 3]", "--run-dir", str(run)])
    assert main(JOB, options) == 0
    assert sizes == [1, 3]
    found = StepTime(**yaml.safe_load((run / "step_time.yaml").read_text())["step_time"])
    assert float(found.predict(10, 0, 3000)) == pytest.approx(float(TRUE.predict(10)), rel=0.03)
    assert len(read_step_log(run / "steps.jsonl")) == 400
