"""Serve a model or ensemble that `raysys federate` trained: predictions and disagreement over HTTP.

`raysys predict --set run=RUN_DIRECTORY` listens on loopback until Ctrl-C.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np

from actors.federated.endpoint import EnsembleEndpoint
from actors.listeners import TlsConfig, base_url, http_options
from actors.serving.endpoint import check_port
from jobs.federate import MODEL_FACTS, MODEL_FILE, FederateConfig
from jobs.launcher import Job, JobContext, Summary, main
from raysys.config import check, check_range, config_from_dict
from raysys.errors import DataError
from raysys.federated.core.datasets import FederatedData
from raysys.federated.core.model import ModelSpec
from raysys.federated.core.serialize import unpack_arrays
from raysys.federated.fedtrans.network import net_from_json
from raysys.runs import RunDirectory

APPLICATION = "federated"
CHECK_S = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PredictConfig:
    """A served model.

    Args:
        run: run directory of ``raysys federate``, a path or a URI.
        model: name of a family's member in ``model.json``; empty takes the largest.
        host, port: where to listen. tls: needed beyond loopback. replicas: copies of the model.
        temperature: of the prediction; None takes the one that training fitted.
    """

    run: str = ""
    model: str = ""
    host: str = "127.0.0.1"
    port: int = 8001
    tls: TlsConfig = dataclasses.field(default_factory=TlsConfig)
    replicas: int = 1
    temperature: float | None = None

    def __post_init__(self) -> None:
        check(self, "run", bool(self.run), "the run directory of a finished `raysys federate`")
        check_range(self, "port", 1, 65535)
        check_range(self, "replicas", 1)
        if self.temperature is not None:
            check_range(self, "temperature", 0, low_open=True)


def load_endpoint(config: PredictConfig) -> tuple[Any, ...]:
    """Arguments of :class:`EnsembleEndpoint` from a run directory.

    Raises:
        StorageError: no such run. DataError: it has no model, or a damaged one. ConfigError: the
            run has no family, or no such member.
    """
    run = RunDirectory.open(config.run)
    if not run.storage.exists(MODEL_FILE):
        raise DataError(config.run, f"has no {MODEL_FILE}", "Let the run finish: --resume")
    facts = run.read_json(MODEL_FACTS)
    arrays = unpack_arrays(run.storage.read(MODEL_FILE), MODEL_FILE)
    fitted = facts["temperature"]
    family = facts.get("family", {})
    if family:
        name = config.model or max(family, key=lambda name: family[name]["macs"])
        check(config, "model", name in family, f"one of {sorted(family)}")
        spec, fitted = net_from_json(family[name]["net"]).spec(), family[name]["temperature"]
        members = arrays[name][None]
    else:
        check(config, "model", not config.model, "empty: the run has no family")
        spec = _spec(config_from_dict(FederateConfig, run.manifest.config), facts)
        members = np.stack([arrays[name] for name in sorted(arrays)])
    temperature = config.temperature or fitted
    return spec, members, tuple(facts["shape"]), temperature, facts["vocabulary"]


def _spec(trained: FederateConfig, facts: dict[str, Any]) -> ModelSpec:
    """The model's spec needs shapes only, so one empty sample stands for the data."""
    classes, vocabulary = facts["classes"], facts["vocabulary"]
    inputs = np.zeros((1, *facts["shape"]), dtype=np.int64 if vocabulary else np.float32)
    targets = np.zeros(1, dtype=np.int64) if classes else np.zeros((1, facts["outputs"]))
    data = FederatedData(
        name="shape", inputs=inputs, targets=targets, test_inputs=inputs, test_targets=targets,
        classes=classes, vocabulary=vocabulary,
    )  # fmt: skip
    return trained.recipe.model.spec(data)


def run(config: PredictConfig, context: JobContext) -> Summary:
    """Serve until interrupted."""
    options = http_options(config.host, config.port, config.tls)
    check_port(config.host, config.port)
    arguments = load_endpoint(config)
    context.ray(num_cpus=max(2, config.replicas))
    from ray import serve

    serve.start(proxy_location="HeadOnly", http_options=options)
    try:
        deployment = serve.deployment(EnsembleEndpoint).options(num_replicas=config.replicas)
        serve.run(deployment.bind(*arguments), name=APPLICATION, route_prefix="/")
        url = base_url(config.host, config.port, config.tls)
        members = len(arguments[1])
        context.console.print(f"{members} models at {url}/predict (Ctrl-C ends it)")
        context.metrics.event("ready", url=url)
        while True:  # Serve replaces replicas that die; the launcher ends this by an exception
            time.sleep(CHECK_S)
    finally:
        serve.shutdown()


JOB = Job(name="predict", config=PredictConfig, run=run)

if __name__ == "__main__":
    raise SystemExit(main(JOB))
