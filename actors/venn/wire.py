"""Between protocol messages and the core's plain values."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from actors.proto.messages import pb
from raysys.errors import ConfigError
from raysys.federated.venn.capability import CLASSES
from raysys.federated.venn.gateway_plan import GatewayPlan, GatewayRound, Offers
from raysys.federated.venn.requests import ALL_CLASSES
from raysys.federated.venn.requirements import Requirement, Schema
from raysys.federated.venn.scheduler import SchedulerCore


def mask_to_bytes(mask: int) -> bytes:
    return mask.to_bytes((mask.bit_length() + 7) // 8, "little")


def mask_from_bytes(data: bytes) -> int:
    if len(data) > 4096:
        raise ConfigError("mask", len(data), "at most 4096 bytes")
    return int.from_bytes(data, "little")


def plan_message(core: SchedulerCore, gateway: str, now_s: float) -> Any:
    """The plan in force for one gateway, with its limits."""
    state = core.state
    message = pb.Plan(
        epoch=state.epoch,
        version=state.version,
        schema_version=core.config.schema.version,
        attributes=core.config.schema.attributes,
        scarcity=state.scarcity,
        flat=state.flat,
        retry_after_s=state.retry_after_s,
        yield_factor=state.yield_factor or 0.0,
        tiered=core.config.tiers > 1,
    )
    for requirement in state.requirements:
        message.requirements.add(bounds=dict(requirement.bounds))
    for mask, groups in state.atoms:
        message.atoms.add(mask=mask_to_bytes(mask), groups=groups)
    place = {slot: place for place, slot in enumerate(state.order)}
    jobs = [job for job in state.jobs.values() if job.open is not None]
    jobs.sort(key=lambda job: (place.get(job.slot, len(place)), job.slot))
    for job in jobs:
        opened = job.open
        assert opened is not None
        grant = opened.grants.get(gateway)
        message.rounds.add(
            task=pb.Task(
                slot=job.slot,
                job_id=job.job_id,
                round=opened.number,
                plan_uri=job.plan_uri,
                upload_endpoint=job.upload_endpoint,
            ),
            round_id=opened.round_id,
            group=job.group,
            limit=grant.limit if grant else 0,
            version=grant.version if grant else 0,
            lease_s=opened.lease_s,
            ends_in_s=max(opened.opened_s + opened.deadline_s - now_s, 0.0),
            size=state.sizes.get(job.slot, 0.0),
            classes=max(opened.classes, 0),
        )
    return message


def plan_from_message(message: Any, now_s: float) -> GatewayPlan:
    """A gateway's view of a plan message."""
    rounds = tuple(
        GatewayRound(
            round_id=item.round_id,
            slot=item.task.slot,
            group=item.group,
            limit=item.limit,
            version=item.version,
            lease_s=item.lease_s,
            ends_s=now_s + item.ends_in_s,
            size=item.size,
            classes=item.classes or ALL_CLASSES,
            task=item.task,
        )
        for item in message.rounds
    )
    return GatewayPlan(
        epoch=message.epoch,
        version=message.version,
        schema=Schema(version=message.schema_version, attributes=tuple(message.attributes)),
        requirements=tuple(
            Requirement.from_mapping(dict(item.bounds)) for item in message.requirements
        ),
        rounds=rounds,
        atoms={mask_from_bytes(item.mask): tuple(item.groups) for item in message.atoms},
        scarcity=tuple(message.scarcity),
        flat=message.flat,
        yield_factor=message.yield_factor or None,
        retry_after_s=message.retry_after_s,
        tiered=message.tiered,
    )


def offer_message(
    offers: Offers, sequence: int, gateway: str, incarnation: int, tickets: bytes = b""
) -> Any:
    """Answer to one batch; ``tickets`` as in the protocol."""
    return pb.OfferBatch(
        sequence=sequence,
        gateway=gateway,
        epoch=incarnation,
        slots=offers.slots.astype("<i4").tobytes(),
        lease_counters=offers.leases.astype("<u8").tobytes(),
        expiry_s=offers.expiry_s.astype("<f4").tobytes(),
        retry_after_s=offers.retry_s.astype("<f4").tobytes(),
        tasks=[item.task for item in offers.rounds.values()],
        lease_tickets=tickets,
    )


def counters_of(data: bytes) -> npt.NDArray[np.uint64]:
    """Lease counters of a batch.

    Raises:
        ConfigError: not a whole number of 8-byte entries, or more than 100,000.
    """
    if len(data) % 8 or len(data) > 800_000:
        raise ConfigError("lease_counters", len(data), "a multiple of 8 bytes, at most 800,000")
    return np.frombuffer(data, dtype="<u8")


def answers_of(message: Any) -> list[list[Any]]:
    """Profiled answers of a usage report as ``[round, classes, response times]``.

    Raises:
        ConfigError: columns of unequal length, an unknown class, or a time that is not finite.
    """
    found = []
    for item in message.answers:
        if len(item.response_s) != 4 * len(item.classes):
            expected = f"{len(item.classes)} float32 values"
            raise ConfigError("answers.response_s", len(item.response_s), expected)
        times = np.frombuffer(item.response_s, dtype="<f4")
        kinds = list(item.classes)
        if any(kind >= CLASSES for kind in kinds):
            raise ConfigError("answers.classes", max(kinds), f"numbers below {CLASSES}")
        if not (np.isfinite(times) & (times >= 0)).all():
            raise ConfigError("answers.response_s", "a value out of range", "finite numbers >= 0")
        found.append([item.round_id, kinds, np.round(times.astype(float), 3).tolist()])
    return found
