"""Hashing, lane-ordered sums and the candidate sketch of the FIITED store, in numpy.

Everything here gives the same bits as ``kernels/fiited_types.h`` and ``fiited_sketch.h``: sums run
over 8 lanes (4 where the chunk is not a multiple of 8) and are then folded pairwise.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from raysys.ops import fiited_abi as abi

F32 = npt.NDArray[np.float32]
U64 = npt.NDArray[np.uint64]
MASK = 0xFFFFFFFFFFFFFFFF
UNMIXER = 0xCFEE444D8B59A89B


def mix(x: int) -> int:
    """The 64-bit mixer: a bijection with full avalanche."""
    x ^= x >> 32
    x = (x * abi.MIXER) & MASK
    x ^= x >> 32
    x = (x * abi.MIXER) & MASK
    return x ^ (x >> 32)


def unmix(x: int) -> int:
    """Inverse of :func:`mix`."""
    x ^= x >> 32
    x = (x * UNMIXER) & MASK
    x ^= x >> 32
    x = (x * UNMIXER) & MASK
    return x ^ (x >> 32)


def mix_array(x: U64) -> U64:
    """:func:`mix` of every element."""
    shift, factor = np.uint64(32), np.uint64(abi.MIXER)
    x = (x ^ (x >> shift)) * factor
    x = (x ^ (x >> shift)) * factor
    return np.asarray(x ^ (x >> shift), np.uint64)


def virtual_row(table: abi.TableConfig, id_: int) -> int:
    """Virtual row of an id (signed ids are read as their bits)."""
    v = mix((id_ & MASK) ^ table.seed)
    return mix((v % table.virtual_rows) ^ table.seed) if table.virtual_rows else v


def uniform(seed: int, indices: U64) -> F32:
    """Deterministic uniform numbers in [0, 1), one per index."""
    mixed = mix_array(np.uint64(seed) + indices * np.uint64(abi.GOLDEN))
    return (mixed >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def noise_seed(v: int, seed: int, step: int) -> int:
    """Seed of a row's rounding noise at a step; ``noise_seed`` of ``fiited_half.h``."""
    return mix(v ^ ((seed + (step + 1) * abi.GOLDEN) & MASK)) >> 32


def round_noisy(values: F32, seed: int, first: int) -> F32:
    """Stochastic rounding to bfloat16, as fp32: elements ``first``, ``first + 1``, ... of a row.

    The expected value is exact: 16 uniform random bits are added below the last bit that stays.
    """
    element = np.arange(first, first + len(values), dtype=np.uint32)
    h = element // np.uint32(2) * np.uint32(0x9E3779B9) + np.uint32(seed)
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x21F0AAAD)
    h ^= h >> np.uint32(15)
    h *= np.uint32(0xD35A2D97)
    h ^= h >> np.uint32(15)
    noise = np.where(element % 2 == 1, h >> np.uint32(16), h & np.uint32(0xFFFF))
    return _upper_half(np.ascontiguousarray(values, np.float32).view(np.uint32) + noise)


def round_nearest(values: F32) -> F32:
    """To the nearest bfloat16, ties to even, as fp32; for finite values."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return _upper_half(bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))


def _upper_half(bits: npt.NDArray[np.uint32]) -> F32:
    return np.asarray((bits & np.uint32(0xFFFF0000)).view(np.float32))


def dot_chunks(a: F32, b: F32, lanes: int) -> F32:
    """Inner products over the last axis of [..., C], in the kernel's order."""
    shape = (*a.shape[:-1], a.shape[-1] // lanes, lanes)
    products = (a * b).reshape(shape)
    total = products[..., 0, :].copy()
    for i in range(1, shape[-2]):
        total = total + products[..., i, :]
    if lanes == 8:
        total = total[..., :4] + total[..., 4:]
    return np.asarray((total[..., 0] + total[..., 2]) + (total[..., 1] + total[..., 3]), np.float32)


def float_bits(x: float) -> int:
    """The pattern of a number as fp32."""
    return int(np.float32(x).view(np.uint32))


def bits_float(bits: int) -> np.float32:
    """The fp32 number of a pattern."""
    return np.uint32(bits).view(np.float32)


def tie_of(key: int, table: int, salt: int, chunk: int) -> int:
    """Order among equal scores: random by row, then earlier chunks first."""
    return (mix(key ^ mix((salt + table) & MASK)) & ~15) | (15 - chunk)


class ReferenceSketch:
    """Four cells per bucket of 14-bit tag, 2-bit count and bf16 utility."""

    def __init__(self, cells: int) -> None:
        self.per_bucket = (cells + 16383) // 16384 if cells > 16384 else 1
        self.cells: npt.NDArray[np.uint32] = np.zeros(16384 * self.per_bucket, np.uint32)
        self.hits = self.misses = 0

    def add(self, key: int, utility: float, noise: int) -> tuple[np.float32, int]:
        """Add to a row's utility; returns the estimate and the sightings."""
        start, tag, weakest = self._index(key), (key >> 20) & 0x3FFF, 0
        amount = np.float32(utility)
        for i in range(4):
            cell = int(self.cells[start + i])
            if cell and cell >> 18 == tag:
                total = np.float32(bits_float((cell & 0xFFFF) << 16) + amount)
                count = min((cell >> 16 & 3) + 1, 3)
                self.cells[start + i] = tag << 18 | count << 16 | _to_bfloat(float(total), noise)
                self.hits += 1
                return total, count
            if not cell or (cell & 0xFFFF) < (int(self.cells[start + weakest]) & 0xFFFF):
                weakest = i
            if not self.cells[start + weakest]:
                break
        self.misses += 1
        old = int(self.cells[start + weakest])
        half = np.float32(bits_float((old & 0xFFFF) << 16) * np.float32(0.5))
        if old and half > amount:
            self.cells[start + weakest] = (old & 0xFFFF0000) | float_bits(float(half)) >> 16
        else:
            self.cells[start + weakest] = tag << 18 | 1 << 16 | _to_bfloat(float(amount), noise)
        return amount, 1

    def erase(self, key: int) -> None:
        """Forget a row that has become resident."""
        start, tag = self._index(key), (key >> 20) & 0x3FFF
        for i in range(start, start + 4):
            if int(self.cells[i]) >> 18 == tag:
                self.cells[i] = 0

    def rescale(self, factor: float) -> None:
        """Multiply all utilities by an exact power of two."""
        values = (self.cells << np.uint32(16)).view(np.float32) * np.float32(factor)
        scaled = (self.cells & np.uint32(0xFFFF0000)) | (values.view(np.uint32) >> np.uint32(16))
        self.cells = np.where(self.cells == 0, 0, scaled).astype(np.uint32)

    def _index(self, key: int) -> int:
        bucket = (key >> 52) * self.per_bucket + ((key & 0xFFFFF) * self.per_bucket >> 20)
        return 4 * bucket


def _to_bfloat(value: float, noise: int) -> int:
    return ((float_bits(value) + (noise & 0xFFFF)) >> 16) & 0xFFFF
