"""Andes as a vLLM scheduler: the only file that touches vLLM's private names.

Loaded by vLLM itself through ``scheduler_cls`` inside the engine process. Each step it may pause
running requests (vLLM's own recompute preemption), reorders the waiting queue and caps the batch;
then stock vLLM schedules the step. Greedy output does not depend on it: a paused request is
recomputed from its own tokens.

The interface is not a public one, so the adapter checks version, signatures and the source of what
it relies on, and refuses to start on anything else (see :func:`check_engine`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import logging
import math
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import vllm
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import FCFSRequestQueue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from actors.andes.engine_reports import JsonLog, StepLog, TenantTotals
from actors.andes.engine_settings import POLICY_FIELD, read_arguments, write_status
from raysys.errors import CapabilityError, ConfigError
from raysys.serving.andes.gain import buffer_s
from raysys.serving.andes.load import replica_load
from raysys.serving.andes.options import shortage_tokens
from raysys.serving.andes.routing import load_to_dict
from raysys.serving.andes.scheduler import AndesScheduler
from raysys.serving.andes.snapshot import Plan, Snapshot
from raysys.serving.andes.spec import QoESpec, default_ttft_s, spec_from_fields
from raysys.serving.andes.table import RequestTable

TESTED_VERSION = "0.29.0"
TESTED_SOURCES = {
    "schedule": "6361fde74c842c97",
    "_preempt_request": "1be81e04f8ff2c9f",
    "add_request": "ab9efd2a1069dbe9",
    "finish_requests": "fc83b2419ccb624c",
}
STATUS_EVERY_S = 0.25
MAX_CLOCK_SKEW_S = 3600.0

logger = logging.getLogger("vllm.raysys.andes")


def check_engine(force: bool = False) -> None:
    """Refuse an engine that the adapter was not tested with.

    Raises:
        CapabilityError: tells what differs and which version was tested.
    """
    version = vllm.__version__.split("+")[0]
    changed = [name for name, digest in TESTED_SOURCES.items() if source_digest(name) != digest]
    if version == TESTED_VERSION and not changed:
        return
    what = f"vLLM {version}" + (f", changed: {', '.join(changed)}" if changed else "")
    if force:
        logger.warning("Andes runs untested on %s (tested with %s)", what, TESTED_VERSION)
        return
    raise CapabilityError(
        f"Andes on {what}",
        f"the adapter was tested with vLLM {TESTED_VERSION} only",
        f"Install vllm=={TESTED_VERSION}, serve with engine.policy=vllm, or set "
        "andes.force_untested=true and check the results yourself",
    )


def source_digest(name: str) -> str:
    """First 16 digits of the SHA-256 of a base method's source; empty where there is none."""
    method = getattr(Scheduler, name, None)
    if method is None:
        return ""
    return hashlib.sha256(inspect.getsource(method).encode()).hexdigest()[:16]


class PlannedQueue(FCFSRequestQueue):  # type: ignore[misc]
    """vLLM's first-come queue, until a plan puts it in order."""

    def put_in_order(self, first: Iterable[Request]) -> None:
        """Move the given requests to the front, in their order; the others follow as they were."""
        present = set(self)
        chosen = [request for request in first if request in present]
        taken = set(chosen)
        rest = [request for request in self if request not in taken]
        self.clear()
        self.extend(chosen)
        self.extend(rest)


class AndesVllmScheduler(AsyncScheduler):  # type: ignore[misc]
    """Stock vLLM scheduling under Andes' plans; with policy ``"fcfs"`` stock vLLM alone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        vllm_config = kwargs.get("vllm_config") or args[0]
        self.andes_config = read_arguments(vllm_config.additional_config)
        check_engine(self.andes_config.force_untested)
        super().__init__(*args, **kwargs)
        self.waiting = PlannedQueue()
        self._step_log = StepLog(self.andes_config.step_log)
        self._decisions = JsonLog(self.andes_config.decision_log)
        self.brain = AndesScheduler(
            self.andes_config.scheduler,
            on_error=lambda error: logger.exception("plan failed, FCFS this step", exc_info=error),
            on_decision=self._decisions.write if self.andes_config.decision_log else None,
        )
        self.table = RequestTable()
        self.slots: dict[str, int] = {}
        self.tenants = TenantTotals()
        self._labels: dict[int, str] = {}
        self._watched: set[str] = set()  # requests that run or ran: the others do not change
        self.bad_targets = 0
        self.plan_ms: deque[float] = deque(maxlen=500)
        self._steps: deque[tuple[int, float, tuple[int, int, int, int]]] = deque(maxlen=64)
        self._max_running = int(self.scheduler_config.max_num_seqs)
        self._batch_cap = self._max_running
        self._updated_at = 0.0
        self._status_at = 0.0
        self._publish(time.monotonic())  # a router must know of a replica that has done nothing yet

    # -- requests ------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        """Read the request's targets, then queue it; a known id only continues its session."""
        known = request.request_id in self.requests
        super().add_request(request)
        if known:
            return
        fields = self._fields(request)
        if self.andes_config.switchable:
            self._switch(fields.get(POLICY_FIELD))
        age = min(max(time.time() - request.arrival_time, 0.0), MAX_CLOCK_SKEW_S)
        spec = self._spec(fields, request.num_prompt_tokens)
        slot = self.table.add(spec, time.monotonic() - age, request.num_prompt_tokens)
        self.table.context_tokens[slot] = self._rounded(request.num_tokens)
        self.slots[request.request_id] = slot
        self._labels[slot] = self.tenants.label(spec.tenant)
        self.tenants.entered(self._labels[slot])
        self.brain.on_event()

    def finish_requests(self, request_ids: Any, finished_status: RequestStatus) -> list[Request]:
        """Aborts arrive here."""
        finished: list[Request] = super().finish_requests(request_ids, finished_status)
        for request in finished:
            self._forget(request.request_id)
        if finished and not self.requests:
            self._publish(time.monotonic())  # no step will come that could tell
        return finished

    def _fields(self, request: Request) -> dict[str, Any]:
        params = request.sampling_params
        return dict(params.extra_args or {}) if params is not None else {}

    def _spec(self, fields: dict[str, Any], prompt_tokens: int) -> QoESpec:
        """The request's targets; wrong ones (the endpoint refuses them) count as none."""
        ttft = self.andes_config.default_ttft_s
        default = QoESpec(
            ttft_s=default_ttft_s(prompt_tokens) if ttft is None else ttft,
            tds=self.andes_config.default_tds,
        )
        try:
            return spec_from_fields(fields, default, strict=False)
        except ConfigError as error:
            self.bad_targets += 1
            logger.warning("request with unusable QoE targets: %s", error)
            return default

    def _switch(self, policy: Any) -> None:
        if policy in ("andes", "fcfs") and policy != self.brain.config.policy:
            self.brain.config = dataclasses.replace(self.brain.config, policy=policy)
            logger.info("policy is now %s", policy)

    def _forget(self, request_id: str) -> None:
        slot = self.slots.pop(request_id, None)
        if slot is None:
            return
        if self.table.running[slot]:
            self.brain.on_finish(float(self.table.context_tokens[slot]))
        else:
            self.brain.on_event()
        self.table.remove(slot)
        self.tenants.left(self._labels.pop(slot))
        self._watched.discard(request_id)

    # -- steps ---------------------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> Any:
        """Plan where due, carry the plan out, and let vLLM schedule the step."""
        started = time.monotonic()
        self.max_num_running_reqs: int = self._max_running
        if self.brain.config.policy == "andes":
            if self.brain.due() and self._wanted():
                self._plan(started)
            else:
                self._cap(self._batch_cap)
        output = super().schedule(throttle_prefills)
        if output.preempted_req_ids:
            self.brain.on_event()
            known = output.preempted_req_ids & self.slots.keys()
            self._watched |= known
            self.tenants.preempted(self._labels[self.slots[one]] for one in known)
        self._steps.append((id(output), started, self._step_facts(output)))
        return output

    def _wanted(self) -> bool:
        """Nothing waits and the running ones have room to grow: every plan would be empty."""
        reserve = shortage_tokens(self.brain.config.planner, len(self.running))
        return bool(self.waiting) or self.kv_free() < reserve

    def _plan(self, now: float) -> None:
        began = time.perf_counter()
        slots, requests = self._refresh(now)
        plan = self.brain.plan(self._snapshot(now, slots))
        self._apply(plan, requests)
        seconds = time.perf_counter() - began
        self.plan_ms.append(1e3 * seconds)
        self.tenants.planned(seconds)
        self.brain.on_plan_time(seconds)

    def _snapshot(self, now: float, slots: Any) -> Snapshot:
        return self.table.snapshot(
            now, slots, capacity_tokens=self.kv_capacity(), free_tokens=self.kv_free(),
            max_batch=self._max_running, step_tokens=self.max_num_scheduled_tokens,
        )  # fmt: skip

    def _refresh(self, now: float) -> tuple[Any, list[Request]]:
        """Bring the table up to date; returns the slots and their requests in one order.

        A request that waits for its first step does not change, and there may be ten thousand of
        them: only those that run, ran, or were paused are looked at.
        """
        for request_id in self.slots.keys() - self.requests.keys():
            self._forget(request_id)  # ended in a way that we were not told
        touched = self._watched | {request.request_id for request in self.running}
        self._watched = {one for one in touched if self._refresh_one(one, now)}
        slots = np.fromiter(self.slots.values(), dtype=np.int64, count=len(self.slots))
        return slots, [self.requests[request_id] for request_id in self.slots]

    def _refresh_one(self, request_id: str, now: float) -> bool:
        """Update one request's columns; whether it can change before it is seen running again."""
        slot, request = self.slots.get(request_id), self.requests.get(request_id)
        if slot is None or request is None:
            return False
        table = self.table
        running = request.status == RequestStatus.RUNNING
        table.running[slot] = running
        table.pausable[slot] = running and not request.is_prefill_chunk
        table.preemptions[slot] = request.num_preemptions
        table.context_tokens[slot] = self._rounded(request.num_tokens)
        if running:
            table.served_s[slot] = now
            missing = request.num_tokens - request.num_computed_tokens
            table.missing_tokens[slot] = max(0, missing) if request.is_prefill_chunk else 0
        else:
            table.missing_tokens[slot] = request.num_tokens - self._cached(request)
        return bool(running or request.num_preemptions)

    def _apply(self, plan: Plan, requests: list[Request]) -> None:
        now = time.monotonic()
        for index in plan.pause:
            request = requests[index]
            if request.status == RequestStatus.RUNNING and not request.is_prefill_chunk:
                self.running.remove(request)
                self._preempt_request(request, now)
        self.waiting.put_in_order(requests[i] for i in (*plan.admit, *plan.hold))
        self._batch_cap = plan.batch_cap
        self._cap(plan.batch_cap)

    def _cap(self, batch_cap: int) -> None:
        """Limit the admissions of this step; never below what runs already."""
        floor = max(1, len(self.running))
        self.max_num_running_reqs = min(self._max_running, max(floor, batch_cap))

    def _rounded(self, tokens: int) -> int:
        return int(math.ceil((tokens + 1) / self.block_size) * self.block_size)

    def _cached(self, request: Request) -> int:
        """Prefix-cache tokens that a paused request would find again; 0 for new ones (cheap)."""
        if request.num_preemptions == 0:
            return 0
        return int(self.kv_cache_manager.get_computed_blocks(request)[1])

    def kv_capacity(self) -> int:
        """KV room in tokens, without the block that vLLM reserves."""
        return int((self.cache_config.num_gpu_blocks - 1) * self.block_size)

    def kv_free(self) -> int:
        """Free KV room in tokens; cached blocks that nobody holds count as free."""
        return int(self.kv_cache_manager.block_pool.get_num_free_blocks() * self.block_size)

    def _step_facts(self, output: Any) -> tuple[int, int, int, int]:
        """Batch, prefill tokens, context tokens, and repeated tokens of a scheduled step."""
        prefill = context = repeated = 0
        for request_id, count in output.num_scheduled_tokens.items():
            request = self.requests[request_id]
            context += request.num_computed_tokens
            if count > 1:
                prefill += count
                repeated += count if request.num_preemptions else 0
        return len(output.num_scheduled_tokens), prefill, context, repeated

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Let vLLM take the tokens, then note their delivery and the step's time."""
        self._emulate_slow_machine(id(scheduler_output))
        results = super().update_from_output(scheduler_output, model_runner_output)
        now = time.monotonic()
        self._note_step(id(scheduler_output), now)
        for result in results.values():
            for output in result.outputs:
                slot = self.slots.get(output.request_id)
                if slot is None:
                    continue
                self.table.deliver_chunk(slot, now, len(output.new_token_ids))
                if output.finish_reason is not None:
                    self._forget(output.request_id)
        if now - self._status_at >= STATUS_EVERY_S or not self.requests:
            self._status_at = now
            self._publish(now)
        return results

    def _note_step(self, identity: int, now: float) -> None:
        while self._steps:
            known, started, (batch, prefill, context, repeated) = self._steps.popleft()
            if known == identity:
                if batch:
                    seconds = now - max(started, self._updated_at)
                    self.brain.on_step(batch, prefill, context, seconds, repeated)
                    self._step_log.note(batch, prefill, context, seconds)
                break
        self._updated_at = now

    def _emulate_slow_machine(self, identity: int) -> None:
        """Stretch the step by the configured factor; nothing at the factor 1."""
        extra = self.andes_config.slowdown - 1.0
        started = next((at for known, at, _ in self._steps if known == identity), None)
        if extra > 0.0 and started is not None:
            time.sleep(extra * (time.monotonic() - max(started, self._updated_at)))

    # -- status --------------------------------------------------------------------------------

    def status(self, now: float) -> dict[str, Any]:
        """Live figures for the router, the autoscaler and the metrics; JSON-ready."""
        slots, _ = self._refresh(now)
        snapshot = self._snapshot(now, slots)
        counters = dataclasses.asdict(self.brain.counters)
        step_time = self.brain.latency.step_time
        plan_ms = sorted(self.plan_ms) or [0.0]
        return {
            "time": time.time(),
            "policy": self.brain.config.policy,
            "mode": self.brain.mode,
            "running": len(self.running),
            "waiting": len(self.waiting) + len(self.skipped_waiting),
            "kv_use": 1.0 - self.kv_free() / max(1, self.kv_capacity()),
            "buffers_s": _quantiles(buffer_s(snapshot)),
            "late": int((buffer_s(snapshot) < 0).sum()),
            "load": load_to_dict(replica_load(snapshot, step_time, time.time())),
            "tenants": self.tenants.to_dict(),
            "plan_ms_p50": plan_ms[len(plan_ms) // 2],
            "plan_ms_p99": plan_ms[math.ceil(0.99 * len(plan_ms)) - 1],
            "step_time": dataclasses.asdict(step_time),
            "max_running": self._max_running,
            "bad_targets": self.bad_targets,
            **counters,
        }

    def _publish(self, now: float) -> None:
        if self.andes_config.status_file is None:
            return
        try:
            write_status(Path(self.andes_config.status_file), self.status(now))
            if not self.requests:
                self._step_log.flush()
                self._decisions.flush()
        except OSError as error:
            logger.warning("status not written: %s", error)

    def shutdown(self) -> None:
        """Write the last status, then shut down; may not run when the engine is killed."""
        self._publish(time.monotonic())
        self._step_log.close()
        self._decisions.close()
        super().shutdown()


def _quantiles(values: Any) -> list[float]:
    """Minimum, median and maximum; empty for no values."""
    if len(values) == 0:
        return []
    return [float(x) for x in np.quantile(values, [0.0, 0.5, 1.0])]
