"""The generated protocol of a steered device, untyped: generated code carries no annotations."""

from __future__ import annotations

from typing import Any

from actors.proto import swan_pb2, swan_pb2_grpc

pb: Any = swan_pb2
rpc: Any = swan_pb2_grpc
