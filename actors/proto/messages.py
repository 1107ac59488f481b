"""The generated Venn protocol as untyped modules: generated code carries no annotations."""

from __future__ import annotations

from typing import Any

from actors.proto import venn_pb2, venn_pb2_grpc

pb: Any = venn_pb2
rpc: Any = venn_pb2_grpc
