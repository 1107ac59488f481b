"""Ray Serve's request router for QoE: a thin shell around :mod:`raysys.serving.andes.routing`.

Installed through Ray Serve's public ``RequestRouterConfig``. Where statistics are missing or too
old (replicas that just started, stock vLLM's scheduler), it does what Ray Serve does by default:
two replicas at random, the shorter queue of both.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray.serve.request_router import (
    PendingRequest,
    ReplicaID,
    ReplicaResult,
    RequestRouter,
    RunningReplica,
)

from actors.andes.engine_settings import ROUTER_FIELD
from raysys.config import config_from_dict
from raysys.errors import ConfigError
from raysys.serving.andes.routing import (
    ReplicaLoad,
    RoutingConfig,
    SentRequests,
    load_from_dict,
    rank_replicas,
)
from raysys.serving.andes.spec import QoESpec, spec_from_fields

LETTERS_PER_TOKEN = 4.0


class QoERequestRouter(RequestRouter):  # type: ignore[misc]
    """Sends each request where the readers together lose the least by it."""

    def initialize_state(
        self, routing: Mapping[str, Any] | None = None, switchable: bool = False
    ) -> None:
        """Called by Ray Serve with ``request_router_kwargs``.

        Args:
            routing: fields of :class:`RoutingConfig`.
            switchable: obey the request field ``andes_router`` (benchmarks only).
        """
        self.routing = config_from_dict(RoutingConfig, routing or {})
        self.sent = SentRequests(time.time, self.routing.max_age_s)
        self._switchable = switchable

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Replicas in order of preference, one a rank; two in one rank compete by queue length."""
        fields = request_fields(pending_request)
        loads = self._loads(candidate_replicas)
        forced = self._switchable and fields.get(ROUTER_FIELD) == "power_of_two"
        if loads is None or forced:
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
        spec, prompt_tokens = request_targets(pending_request, fields)
        order = rank_replicas(loads, spec, prompt_tokens, self.routing)
        return [[candidate_replicas[index]] for index in order]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult
    ) -> None:
        """Remember what the replica's statistics do not show yet."""
        spec, prompt_tokens = request_targets(pending_request, request_fields(pending_request))
        self.sent.note(str(replica_id), spec, prompt_tokens)

    def _loads(self, replicas: Sequence[RunningReplica]) -> list[ReplicaLoad] | None:
        """Loads of all candidates with what was sent since, or None where one is not known."""
        names = [str(replica.replica_id) for replica in replicas]
        self.sent.keep_only(names)
        oldest = time.time() - self.routing.max_age_s
        loads = []
        for name, replica in zip(names, replicas):
            load = load_from_dict(replica.routing_stats.get("load") or {})
            if load is None or load.time_s < oldest:
                return None
            loads.append(self.sent.known_load(name, load))
        return loads or None


def request_fields(pending_request: PendingRequest | None) -> Mapping[str, Any]:
    """The ``vllm_xargs`` of the request, as the ingress completed them."""
    body = _body(pending_request)
    fields = getattr(body, "vllm_xargs", None)
    return fields if isinstance(fields, Mapping) else {}


def request_targets(
    pending_request: PendingRequest | None, fields: Mapping[str, Any]
) -> tuple[QoESpec, float]:
    """The reader's targets and about how many tokens the prompt has."""
    try:
        spec = spec_from_fields(fields, QoESpec(), strict=False)
    except ConfigError:  # the ingress refuses these; other callers of the deployment may not
        spec = QoESpec()
    body = _body(pending_request)
    text = getattr(body, "messages", None) or getattr(body, "prompt", None) or ""
    return spec, max(1.0, len(str(text)) / LETTERS_PER_TOKEN)


def _body(pending_request: PendingRequest | None) -> Any:
    args = getattr(pending_request, "args", None)
    return args[0] if args else None
