"""Regenerate the protocol code in this folder from the ``.proto`` files.

``python -m actors.proto.generate`` writes it in place; a test makes it elsewhere and compares.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from raysys.errors import CapabilityError, RaysysError

FOLDER = Path(__file__).resolve().parent


def generate(target: Path) -> list[Path]:
    """Write the generated modules below ``target/actors/proto``; returns their paths.

    Raises:
        CapabilityError: grpcio-tools is not installed.
    """
    try:
        protoc = importlib.import_module("grpc_tools.protoc")
    except ImportError as error:
        reason, remedy = "grpcio-tools is not installed", "Install the 'test' extra"
        raise CapabilityError("protocol generation", reason, remedy) from error
    root = FOLDER.parent.parent
    include = Path(str(protoc.__file__)).parent / "_proto"
    written = []
    for proto in sorted(FOLDER.glob("*.proto")):
        name = proto.relative_to(root).as_posix()
        flags = [f"--python_out={target}", f"--grpc_python_out={target}"]
        code = protoc.main(["protoc", f"-I{root}", f"-I{include}", *flags, name])
        if code:
            raise RaysysError(f"protoc failed with exit code {code} on {name}")
        stem = target / "actors" / "proto" / proto.stem
        written += [stem.with_name(f"{proto.stem}{end}.py") for end in ("_pb2", "_pb2_grpc")]
    return written


if __name__ == "__main__":
    for path in generate(FOLDER.parent.parent):
        sys.stdout.write(f"{path}\n")
