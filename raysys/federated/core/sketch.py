"""Fixed-size projections of updates, for strategies that compare clients.

A seeded sparse sign projection (``density`` non-zeros per parameter) keeps inner products and
distances on average; the relative error of one pair is about sqrt(2 / dim). Sketches of different
models or rounds are not comparable.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from raysys.federated.core.randomness import KeyedStreams, Purpose

Float32Array = npt.NDArray[np.float32]


def sketch_rows(delta_kP: Float32Array, dim: int, density: int, seed: int) -> Float32Array:
    """Project each row of ``delta_kP`` float32 [k, P] to float32 [k, dim]."""
    matrix = _projection(delta_kP.shape[1], dim, density, seed)
    return np.ascontiguousarray((matrix @ delta_kP.T).T, dtype=np.float32)


@functools.lru_cache(maxsize=4)
def _projection(n_params: int, dim: int, density: int, seed: int) -> Any:
    """Sparse [dim, P] with ``density`` entries of +-1/sqrt(density) in each column."""
    import scipy.sparse  # half a second of import that most workers never need

    raw = KeyedStreams(seed, Purpose.SKETCH).raw(n_params, n_params * density)
    target = ((raw >> np.uint64(1)) % np.uint64(dim)).astype(np.int32)
    sign = np.where(raw & np.uint64(1), 1.0, -1.0).astype(np.float32) / np.sqrt(np.float32(density))
    column = np.repeat(np.arange(n_params, dtype=np.int32), density)
    return scipy.sparse.csr_matrix((sign, (target, column)), shape=(dim, n_params))
