"""Settings handed to Ray Serve and vLLM, and the errors before any engine starts."""

from __future__ import annotations

import importlib.util
import pickle
import socket
from pathlib import Path

import pytest

from actors.serving import application
from actors.serving.application import (
    deployment_options,
    engine_environment,
    engine_options,
    llm_options,
)
from actors.serving.autoscaling import QoEScalingPolicy
from actors.serving.config import EngineConfig, ModelConfig, ServingConfig
from actors.serving.endpoint import check_port, first_reason, free_port
from raysys.config import load_config
from raysys.errors import CapabilityError, ConfigError, StorageError
from raysys.serving.model_files import ModelFacts

FACTS = ModelFacts(
    architecture="LlamaForCausalLM", max_length=8192, kv_values_per_token=100, vocabulary=10
)
CPU = EngineConfig(device="cpu", max_model_len=512, kv_tokens=1000, max_num_seqs=4)


def test_the_kv_room_is_a_whole_number_of_blocks_and_the_reserved_one() -> None:
    options = engine_options(CPU, FACTS)
    assert options["num_gpu_blocks_override"] == 32 + 1  # ceil(1000 / 32), one is reserved
    assert options["block_size"] % 32 == 0
    assert options["kv_cache_memory_bytes"] >= 33 * 32 * 100 * 4
    assert options["dtype"] == "float32"
    assert options["enforce_eager"] is True


def test_the_model_limits_the_length() -> None:
    short = ModelFacts(architecture="X", max_length=256, kv_values_per_token=1, vocabulary=1)
    assert engine_options(CPU, short)["max_model_len"] == 256


def test_a_gpu_keeps_its_own_room_and_type() -> None:
    options = engine_options(EngineConfig(device="gpu"), FACTS)
    assert options["dtype"] == "auto"
    assert "num_gpu_blocks_override" not in options
    assert "enforce_eager" not in options


def test_streams_are_not_batched() -> None:
    options = llm_options(ServingConfig(engine=CPU), FACTS)
    assert options["experimental_configs"]["stream_batching_interval_ms"] == 0
    assert options["engine_kwargs"]["stream_interval"] == 1


def test_every_replica_works_offline_and_waits_passively() -> None:
    environment = engine_environment(EngineConfig(device="cpu", bind_cores="nobind"))
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def test_without_vllm_the_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CapabilityError, match=r"vllm is not installed.*make setup"):
        application.build_application(ServingConfig())


def test_a_missing_folder_is_found_before_the_engine(tmp_path: Path) -> None:
    config = ServingConfig(model=ModelConfig(folder=str(tmp_path / "absent")))
    with pytest.raises(StorageError, match="no such model folder"):
        application.build_application(config)


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("port=0", "port"),
        ("port=70000", "port"),
        ("port=http", "port"),
        ("replicas=0", "replicas"),
        ("host=''", "host"),
        ("model.name=' '", "model.name"),
        ("engine.device=tpu", "engine.device"),
        ("engine.max_num_seqs=0", "engine.max_num_seqs"),
        ("engine.kv_tokens=100", "engine.kv_tokens"),
        ("engine.kv_token=100", "engine.kv_token"),
    ],
)
def test_bad_settings_name_their_field(override: str, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(ServingConfig, overrides=[override])
    assert caught.value.field == field


def test_the_address_for_clients() -> None:
    assert ServingConfig(port=81).url == "http://127.0.0.1:81/v1"
    assert ServingConfig(host="0.0.0.0").url == "http://127.0.0.1:8000/v1"
    assert ServingConfig(host="10.0.0.1").url == "http://10.0.0.1:8000/v1"


def test_a_taken_port_is_named_with_a_remedy() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127.0.0.1:{port}.*--set port") as caught:
            check_port("127.0.0.1", port)
    assert caught.value.exit_code == 2
    assert pickle.loads(pickle.dumps(caught.value)).field == "port"


def test_a_free_port_passes_and_a_foreign_address_does_not() -> None:
    check_port("127.0.0.1", free_port())
    with pytest.raises(ConfigError, match="port"):
        check_port("203.0.113.7", 8000)


def test_the_cause_is_picked_from_a_long_message() -> None:
    message = "The deployment failed.\n  File x, line 3\nRuntimeError: no memory\nRetrying."
    assert first_reason(message) == "RuntimeError: no memory"
    assert first_reason("") == "no reason was given"
    assert first_reason("still starting") == "still starting"


def test_the_fleet_gets_the_qoe_router_and_a_fixed_size() -> None:
    options = deployment_options(ServingConfig(replicas=3, engine=CPU))
    assert options["num_replicas"] == 3
    router = options["request_router_config"]
    assert router["request_router_class"] == "actors.serving.router:QoERequestRouter"
    assert router["request_routing_stats_period_s"] == 0.5
    plain = load_config(ServingConfig, overrides=["fleet.router=power_of_two"])
    assert "request_router_class" not in deployment_options(plain)["request_router_config"]


def test_stock_vllm_gets_ray_serves_own_router_and_autoscaler() -> None:
    config = load_config(ServingConfig, overrides=["engine.policy=vllm", "fleet.max_replicas=2"])
    options = deployment_options(config)
    assert "request_router_config" not in options
    assert "policy" not in options["autoscaling_config"]
    assert llm_options(config, FACTS)["server_cls"].endswith(":ModelServer")


def test_scaling_options_reach_the_policy() -> None:
    config = load_config(
        ServingConfig, overrides=["fleet.max_replicas=4", "fleet.scaling.late_share=0.2"]
    )
    options = deployment_options(config)["autoscaling_config"]
    assert (options["min_replicas"], options["max_replicas"]) == (1, 4)
    policy = QoEScalingPolicy(**options["policy"]["policy_kwargs"])
    assert policy.config.late_share == 0.2
    with pytest.raises(ConfigError, match="replicas"):
        load_config(ServingConfig, overrides=["fleet.max_replicas=1", "replicas=2"])
