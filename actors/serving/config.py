"""Configuration of the serving endpoint: which model, what engine, where it listens."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from actors.andes.engine_settings import AndesEngineConfig
from actors.listeners import TlsConfig, base_url
from actors.serving import packaged_model
from actors.serving.admission import AdmissionConfig
from raysys import machine
from raysys.config import check, check_choice, check_range
from raysys.errors import ConfigError
from raysys.serving.andes.routing import RoutingConfig
from raysys.serving.andes.scaling import ScalingConfig

KV_BLOCK = 32  # tokens; vLLM's CPU attention wants a multiple of 32
CPU_KV_TOKENS = 16384
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which model is served.

    Args:
        name: the name that clients use.
        folder: a model folder in the Hugging Face layout, present on every node that runs a
            replica; None serves the packaged SmolLM2-135M-Instruct.
    """

    name: str = packaged_model.NAME
    folder: str | None = None

    def __post_init__(self) -> None:
        check(self, "name", bool(self.name.strip()), "a name that is not empty")

    @property
    def path(self) -> Path:
        return Path(self.folder) if self.folder else packaged_model.default_folder()


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How each replica's vLLM engine runs.

    Args:
        policy: ``"andes"`` schedules by the readers' QoE, ``"vllm"`` in order of arrival.
        device: ``"auto"`` takes an NVIDIA GPU where there is one.
        dtype: ``"auto"`` is float32 on a CPU (bfloat16 is emulated there) and vLLM's choice on GPU.
        max_model_len: longest prompt + answer in tokens.
        max_num_seqs: most sequences in one step.
        max_num_batched_tokens: most tokens computed in one step (chunked prefill budget).
        kv_tokens: KV room in tokens; None is 16,384 on a CPU, and on a GPU what is free.
        prefix_caching: reuse the KV of equal prompt beginnings.
        bind_cores: ``"auto"`` pins a CPU engine's threads to cores; ``"nobind"`` lets the system
            place them, which several replicas on one machine need.
    """

    policy: Literal["andes", "vllm"] = "andes"
    device: Literal["auto", "cpu", "gpu"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int = 2048
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 2048
    kv_tokens: int | None = None
    prefix_caching: bool = True
    bind_cores: Literal["auto", "nobind"] = "auto"

    def __post_init__(self) -> None:
        check_choice(self, "policy", ("andes", "vllm"))
        check_choice(self, "device", ("auto", "cpu", "gpu"))
        check_range(self, "max_model_len", 64)
        check_range(self, "max_num_seqs", 1, 4096)
        check_range(self, "max_num_batched_tokens", 32)
        if self.kv_tokens is not None:
            enough = self.kv_tokens >= self.max_model_len
            expected = f"at least max_model_len, {self.max_model_len} tokens"
            check(self, "kv_tokens", enough, expected, "One request must fit in")

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu" or (self.device == "auto" and not machine.gpu_names())


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetConfig:
    """Several replicas: who gets a request, and how many replicas there are.

    Args:
        router: ``"qoe"`` sends a request where the readers lose the least; ``"power_of_two"`` is
            Ray Serve's default: two replicas at random, the shorter queue of both.
        routing: options of the QoE router.
        stats_period_s: how often a replica's statistics go to the router.
        switchable: obey the request field ``andes_router`` (benchmarks only).
        max_replicas: scale between ``replicas`` and this many by the readers' QoE; None keeps
            ``replicas``.
        scaling: options of the autoscaler.
        upscale_delay_s, downscale_delay_s: how long a wish must last before it is followed.
    """

    router: Literal["qoe", "power_of_two"] = "qoe"
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    stats_period_s: float = 0.5
    switchable: bool = False
    max_replicas: int | None = None
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    upscale_delay_s: float = 5.0
    downscale_delay_s: float = 300.0

    def __post_init__(self) -> None:
        check_choice(self, "router", ("qoe", "power_of_two"))
        check_range(self, "stats_period_s", 0.05, 60.0)
        check_range(self, "upscale_delay_s", 0.0)
        check_range(self, "downscale_delay_s", 0.0)
        if self.max_replicas is not None:
            check_range(self, "max_replicas", 1, 1024)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingConfig:
    """The whole endpoint.

    Args:
        host: address to listen on; loopback unless you decide otherwise.
        port: TCP port.
        tls: certificates, without which it does not listen beyond loopback.
        replicas: engines behind the endpoint.
        max_waiting: requests that may wait for a replica before the endpoint answers 503.
        start_timeout_s: how long the engines may take to start.
        page: the page at ``/``; ``"auto"`` lets it start bursts and switch policies (which costs
            the engine's time) only on a loopback address without API keys, ``"full"`` always,
            ``"read"`` never, ``"none"`` serves no page.
        fleet: router and autoscaler.
        admission: limits and API keys at the door.
        andes: the QoE-aware scheduler's options, and the targets of requests that tell none.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    tls: TlsConfig = field(default_factory=TlsConfig)
    replicas: int = 1
    max_waiting: int = 512
    start_timeout_s: float = 600.0
    page: Literal["auto", "full", "read", "none"] = "auto"
    fleet: FleetConfig = field(default_factory=FleetConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    andes: AndesEngineConfig = field(default_factory=AndesEngineConfig)

    def __post_init__(self) -> None:
        check_range(self, "port", 1, 65535)
        check_range(self, "replicas", 1, 1024)
        check_range(self, "max_waiting", 1)
        check_range(self, "start_timeout_s", 1)
        check_choice(self, "page", ("auto", "full", "read", "none"))
        most = self.fleet.max_replicas
        check(self, "replicas", most is None or self.replicas <= most, "at most fleet.max_replicas")
        if not self.host:
            raise ConfigError("host", self.host, "an address such as 127.0.0.1")

    @property
    def bursts(self) -> bool:
        """Whether the page may start bursts and switch policies."""
        if self.page == "auto":
            return self.host in LOOPBACK and not self.admission.keys
        return self.page == "full"

    @property
    def engine_andes(self) -> AndesEngineConfig:
        """What the engine gets: bursts from the page need a policy that can be switched."""
        return replace(self.andes, switchable=self.andes.switchable or self.bursts)

    @property
    def url(self) -> str:
        """Base address for OpenAI clients."""
        return f"{base_url(self.host, self.port, self.tls)}/v1"
