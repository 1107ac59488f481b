"""Calls to a device that is steered from outside (``SwanDevice``)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from actors.proto.swan_messages import pb, rpc
from actors.venn.security import SecurityConfig, channel, metadata
from actors.venn.status import remote_error
from raysys.errors import DataError
from raysys.federated.core.model import layout_of
from raysys.federated.swan.plans import Plan, pack_weights, plan_to_json, unpack_update

TIMEOUT_S = 10.0


class SwanDeviceClient:
    """One device; ``async with`` closes it.

    Raises (all methods):
        RemoteError: the call failed; the reason starts with the gRPC status.
    """

    def __init__(self, address: str, security: SecurityConfig | None = None) -> None:
        self.address = address
        self._security = security or SecurityConfig()
        self._channel = channel(address, self._security)
        self._stub = rpc.SwanDeviceStub(self._channel)

    async def close(self) -> None:
        """Close the channel; may be called twice."""
        await self._channel.close()

    async def __aenter__(self) -> SwanDeviceClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def plan(self, plan: Plan) -> Any:
        """What training a plan would cost there, and whether the device would do it now."""
        return await self._call(self._stub.Plan, pb.PlanQuery(plan=plan_to_json(plan)))

    async def train(
        self,
        plan: Plan,
        weights: npt.NDArray[np.float32],
        on_progress: Callable[[Any], None] | None = None,
    ) -> tuple[npt.NDArray[np.float32], dict[str, float]]:
        """Train there; the change of the weights, float32 [P], and facts about the training.

        Raises:
            DataError: the update arrived damaged.
        """
        request = pb.TrainRequest(plan=plan_to_json(plan), model=pack_weights(weights))
        update, digest = bytearray(), b""
        try:
            async for part in self._stub.Train(request, metadata=metadata(self._security)):
                update += part.update
                digest = part.update_sha256
                if on_progress is not None:
                    on_progress(part)
        except grpc.aio.AioRpcError as error:
            raise remote_error(self.address, error) from error
        if hashlib.sha256(update).digest() != digest:
            raise DataError(self.address, "the update does not have its checksum", "Train again")
        return unpack_update(bytes(update), layout_of(plan.spec), self.address)

    async def control(self, kind: str) -> Any:
        """``status``, ``pause``, ``resume`` or ``stop``; whether it took effect, and the state."""
        command = pb.Command(kind=pb.Command.Kind.Value(kind.upper()))
        return await self._call(self._stub.Control, command)

    async def share_profile(self, key: str, profile: dict[str, Any]) -> Any:
        """Tell the device what others of its kind have measured."""
        message = pb.SharedProfile(key=key, profile=json.dumps(profile))
        return await self._call(self._stub.ShareProfile, message)

    async def _call(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, timeout=TIMEOUT_S, metadata=metadata(self._security))
        except grpc.aio.AioRpcError as error:
            raise remote_error(self.address, error) from error
