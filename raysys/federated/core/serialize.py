"""Named arrays as bytes, through Arrow: nothing that arrives from outside is ever unpickled.

One Arrow IPC stream with a row per array: name, dtype, shape, content. The schema carries a format
version, so that an unknown file is refused instead of misread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raysys.errors import DataError

FORMAT = b"raysys-arrays-1"
DTYPES = ("float32", "float64", "int8", "int32", "int64", "uint8", "uint64", "bool")
SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("dtype", pa.string()),
        ("shape", pa.list_(pa.int64())),
        ("content", pa.large_binary()),
    ],
    metadata={"format": FORMAT},
)


def pack_arrays(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Serialise named arrays of plain number types.

    Raises:
        DataError: an array has a type that is not allowed (objects, strings, float16).
    """
    rows = []
    for name, array in arrays.items():
        if array.dtype.name not in DTYPES:
            raise DataError(name, f"dtype {array.dtype} is not one of {DTYPES}", "Convert it")
        content = np.ascontiguousarray(array).tobytes()
        rows.append(
            {"name": name, "dtype": array.dtype.name, "shape": array.shape, "content": content}
        )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
    content = sink.getvalue().to_pybytes()
    assert isinstance(content, bytes)
    return content


def unpack_arrays(content: bytes, source: str = "arrays") -> dict[str, npt.NDArray[Any]]:
    """Read what :func:`pack_arrays` wrote; the arrays are read-only views of ``content``.

    Args:
        source: where the bytes came from, for the error.

    Raises:
        DataError: not such a stream, or an array whose size contradicts its shape.
    """
    try:
        with pa.ipc.open_stream(pa.py_buffer(content)) as reader:
            if (reader.schema.metadata or {}).get(b"format") != FORMAT:
                raise DataError(source, "is not a raysys array stream of this version", "")
            rows = reader.read_all().to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(source, f"damaged ({error})", "Fetch or write it again") from error
    return {row["name"]: _array(row, source) for row in rows}


def _array(row: Mapping[str, Any], source: str) -> npt.NDArray[Any]:
    name, dtype, shape, content = row["name"], row["dtype"], row["shape"], row["content"]
    if dtype not in DTYPES or any(size < 0 for size in shape):
        raise DataError(source, f"array {name!r} is {dtype} {shape}", f"Use one of {DTYPES}")
    if math.prod(shape) * np.dtype(dtype).itemsize != len(content):
        raise DataError(source, f"array {name!r} has {len(content)} bytes for {shape}", "")
    return np.frombuffer(content, dtype=dtype).reshape(shape)
