"""A trained ensemble served over HTTP by Ray Serve, from the run directory alone."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
import warnings
from pathlib import Path
from typing import Any

import pytest

from actors.federated.endpoint import EnsembleEndpoint
from actors.serving.endpoint import free_port
from actors.session import Session
from jobs import federate, launcher, predict
from raysys.errors import DataError, StorageError

SMALL = [
    "rounds=2", "workers=1", "worker_cpus=0", "recipe.clients_per_round=20",
    "recipe.model.hidden=[8]", "ensemble.k=2",
]  # fmt: skip


def post(url: str, body: Any) -> tuple[int, Any]:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=180) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_an_ensemble_is_served_from_its_run(
    ray_session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher.JobContext, "ray", lambda self, **changes: ray_session)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray Serve's own deprecations are not ours to mend
        from ray import serve
    folder = tmp_path / "run"
    flags = [flag for setting in SMALL for flag in ("--set", setting)]
    assert launcher.main(federate.JOB, ["--run-dir", str(folder), *flags]) == 0
    arguments = predict.load_endpoint(predict.PredictConfig(run=str(folder)))
    assert arguments[1].shape[0] == 2
    assert arguments[3] > 0
    port = free_port()
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    try:
        small = {"ray_actor_options": {"num_cpus": 0}}
        application = serve.deployment(EnsembleEndpoint).options(**small).bind(*arguments)
        serve.run(application, name=predict.APPLICATION, route_prefix="/")
        url = f"http://127.0.0.1:{port}/predict"
        status, answer = post(url, {"inputs": [[[[0.5] * 8] * 8]]})
        assert status == 200
        assert sum(answer["probabilities"][0]) == pytest.approx(1)
        assert answer["disagreement"][0] > 0
        assert post(url, {"inputs": [[0.5]]})[0] == 422
    finally:
        serve.shutdown()


def test_what_is_not_a_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises((StorageError, DataError)):
        predict.load_endpoint(predict.PredictConfig(run=str(tmp_path / "nothing")))
