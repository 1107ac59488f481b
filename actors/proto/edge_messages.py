"""The generated edge protocol as untyped modules: generated code carries no annotations."""

from __future__ import annotations

from typing import Any

from actors.proto import edge_pb2, edge_pb2_grpc

pb: Any = edge_pb2
rpc: Any = edge_pb2_grpc
