"""Builds the Ray Serve application: Ray's own LLM deployment with settings for true pace.

Three settings matter for what a reader sees: Ray Serve's 50 ms batching of streamed chunks is off,
a chunk carries one token, and the engine's room is set for the machine. On a CPU compilation is off
as well: it takes minutes and was measured to bring nothing for a model of this size.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

from actors.andes.engine_settings import engine_arguments
from actors.serving import packaged_model
from actors.serving.config import (
    CPU_KV_TOKENS,
    KV_BLOCK,
    EngineConfig,
    FleetConfig,
    ModelConfig,
    ServingConfig,
)
from raysys.config import config_to_dict
from raysys.errors import CapabilityError
from raysys.serving.model_files import ModelFacts, check_folder

HEALTH_CHECK_S = 2.0
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def check_vllm() -> None:
    """Check that vLLM is installed, without importing it (that takes many seconds).

    Raises:
        CapabilityError: it is not.
    """
    if importlib.util.find_spec("vllm") is None:
        raise CapabilityError(
            "vLLM",
            "the package vllm is not installed",
            "Run `make setup`, or see docs/serving.md for the install on CPU and on GPU",
        )


def check_model(config: ModelConfig) -> ModelFacts:
    """Check the model before any engine starts, preparing the packaged one where needed.

    Raises:
        CapabilityError: the packaged model's package is not installed.
        StorageError, DataError: the folder is missing or damaged; names the file.
    """
    if config.folder is None:
        packaged_model.prepare()
    return check_folder(config.path, "Give a whole model folder to model.folder", checksums=False)


def build_application(config: ServingConfig) -> Any:
    """Build the OpenAI-compatible application for ``serve.run``.

    Raises:
        CapabilityError: vLLM is not installed.
        StorageError, DataError: the model folder is missing or damaged.
    """
    check_vllm()
    facts = check_model(config.model)
    from ray import serve
    from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata
    from ray.serve.llm import LLMConfig, build_llm_deployment

    from actors.serving.ingress import make_ingress

    llm = LLMConfig(**llm_options(config, facts))
    _, ingress = make_ingress()
    options = ingress.get_deployment_options([llm])
    return serve.deployment(ingress, **options, ray_actor_options={"num_cpus": 0}).bind(
        llm_deployments={llm.model_id: build_llm_deployment(llm)},
        model_cards={llm.model_id: to_model_metadata(llm.model_id, llm)},
        settings=config_to_dict(config),
    )


def llm_options(config: ServingConfig, facts: ModelFacts) -> dict[str, Any]:
    """Arguments of Ray's ``LLMConfig``."""
    device = "cpu" if config.engine.on_cpu else "gpu"
    options: dict[str, Any] = {
        "model_loading_config": {
            "model_id": config.model.name,
            "model_source": str(config.model.path),
        },
        "accelerator_config": {"kind": device},
        "deployment_config": deployment_options(config),
        "engine_kwargs": engine_options(config.engine, facts),
        "runtime_env": {"env_vars": engine_environment(config.engine)},
        "callback_config": {
            "callback_class": "actors.serving.node_setup.LocalModelCheck",
            "callback_kwargs": {"packaged": config.model.folder is None},
        },
        "experimental_configs": {"stream_batching_interval_ms": 0},
        "log_engine_metrics": True,
    }
    options["server_cls"] = "actors.serving.model_server:ModelServer"
    if config.engine.policy == "andes":
        options["engine_kwargs"] |= engine_arguments(config.engine_andes)
        options["server_cls"] = "actors.serving.replica:QoEServer"
    if device == "cpu":
        options["placement_group_config"] = {"bundles": [{"CPU": 1}]}
    return options


def engine_options(config: EngineConfig, facts: ModelFacts) -> dict[str, Any]:
    """Arguments of vLLM's engine."""
    options: dict[str, Any] = {
        "max_model_len": min(config.max_model_len, facts.max_length),
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "enable_prefix_caching": config.prefix_caching,
        "stream_interval": 1,
    }
    dtype = "float32" if config.dtype == "auto" and config.on_cpu else config.dtype
    options["dtype"] = dtype
    tokens = CPU_KV_TOKENS if config.kv_tokens is None and config.on_cpu else config.kv_tokens
    if tokens is not None:
        blocks = math.ceil(max(tokens, options["max_model_len"]) / KV_BLOCK) + 1  # one is reserved
        options["block_size"] = KV_BLOCK
        options["num_gpu_blocks_override"] = blocks
    if config.on_cpu:
        value_bytes = _DTYPE_BYTES[dtype]
        # The override decides; this only has to be enough, or vLLM would take half the memory.
        options["kv_cache_memory_bytes"] = facts.kv_bytes((blocks + 1) * KV_BLOCK, value_bytes)
        options["enforce_eager"] = True
    return options


def engine_environment(config: EngineConfig) -> dict[str, str]:
    """Environment of a replica's processes."""
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    if config.on_cpu:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = config.bind_cores
    return environment


def deployment_options(config: ServingConfig) -> dict[str, Any]:
    """Ray Serve's options of the model's deployment: size, queue, router, autoscaling."""
    options: dict[str, Any] = {
        # A replica takes everything: the order is the engine's decision, not the proxy's.
        "max_ongoing_requests": config.engine.max_num_seqs + config.max_waiting,
        "max_queued_requests": config.max_waiting,
        "health_check_period_s": HEALTH_CHECK_S,
        "graceful_shutdown_timeout_s": 5.0,
        "ray_actor_options": {"num_cpus": 0},
    }
    fleet = config.fleet
    by_qoe = config.engine.policy == "andes"  # stock vLLM's scheduler tells nothing
    if by_qoe:
        options["request_router_config"] = _router_options(fleet)
    if fleet.max_replicas is None:
        return options | {"num_replicas": config.replicas}
    return options | {
        "autoscaling_config": {
            "min_replicas": config.replicas,
            "max_replicas": fleet.max_replicas,
            "upscale_delay_s": fleet.upscale_delay_s,
            "downscale_delay_s": fleet.downscale_delay_s,
            "metrics_interval_s": 1.0,
            "look_back_period_s": 5.0,
            **({"policy": _scaling_policy(fleet)} if by_qoe else {}),
        }
    }


def _router_options(fleet: FleetConfig) -> dict[str, Any]:
    chosen: dict[str, Any] = {"request_routing_stats_period_s": fleet.stats_period_s}
    if fleet.router == "qoe":
        chosen["request_router_class"] = "actors.serving.router:QoERequestRouter"
        chosen["request_router_kwargs"] = {
            "routing": config_to_dict(fleet.routing),
            "switchable": fleet.switchable,
        }
    return chosen


def _scaling_policy(fleet: FleetConfig) -> dict[str, Any]:
    return {
        "policy_function": "actors.serving.autoscaling:QoEScalingPolicy",
        "policy_kwargs": config_to_dict(fleet.scaling),
    }
