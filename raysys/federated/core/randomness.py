"""Counter-based randomness: a draw depends on what it is for, never on when or where it happens.

Every stream is numpy's Philox, keyed by (job seed, purpose) and counted by (round, client). So the
batches of a client are the same however clients are grouped and however many workers there are.
"""

from __future__ import annotations

import enum
import functools

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


class Purpose(enum.IntEnum):
    """What a stream is for; two purposes never share numbers."""

    SELECTION = 1
    BATCHES = 2
    INITIALISATION = 3
    PARTITION = 4
    SKETCH = 5
    PRIVACY = 6
    SCHEDULE = 7
    DEVICES = 8
    SPLIT = 9
    FAULTS = 10


class KeyedStreams:
    """Raw 64-bit draws for many clients of one (job seed, purpose, round).

    One bit generator is re-used by setting its counter: four times cheaper than one per client.
    """

    def __init__(self, seed: int, purpose: Purpose, round_id: int = 0) -> None:
        self._bits = np.random.Philox(key=[seed % 2**64, int(purpose)])
        self._state = self._bits.state
        self._round = round_id % 2**64

    def raw(self, client: int, n: int) -> npt.NDArray[np.uint64]:
        """First ``n`` draws of one client's stream, uint64."""
        state = self._state
        state["state"]["counter"][:] = (0, 0, client, self._round)
        state["buffer_pos"] = 4
        state["has_uint32"] = 0
        self._bits.state = state
        return self._bits.random_raw(n)


def hashed(seed: int, purpose: Purpose, *counters: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    """One 64-bit number for each combination of counters, for whole arrays at once.

    Counters are broadcast; each goes through the finaliser of SplitMix64 (Steele et al. 2014) on
    top of the ones before. For schedules and groups, where a Philox stream per client costs more
    than the work it decides.
    """
    state = _root(seed, purpose)
    arrays = [np.asarray(counter, dtype=np.uint64) for counter in counters]
    mixed = _mix(np.concatenate([array.reshape(-1) for array in arrays]))  # all at once
    begin = 0
    for array in arrays:
        part = mixed[begin : begin + array.size]
        state = _mix(state ^ (part if array.ndim < 2 else part.reshape(array.shape)))
        begin += array.size
    return state if any(array.ndim for array in arrays) else state.reshape(())


@functools.lru_cache(maxsize=64)
def _root(seed: int, purpose: Purpose) -> npt.NDArray[np.uint64]:
    """Start of a hash, uint64 [1]: numpy warns of overflow for scalars only."""
    return _mix(np.array([(seed % 2**64 + int(purpose)) % 2**64], dtype=np.uint64))


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    mixed = values + _GOLDEN
    mixed = (mixed ^ (mixed >> _SHIFTS[0])) * _FACTORS[0]
    mixed = (mixed ^ (mixed >> _SHIFTS[1])) * _FACTORS[1]
    finished: npt.NDArray[np.uint64] = mixed ^ (mixed >> _SHIFTS[2])
    return finished


def generator(
    seed: int, purpose: Purpose, round_id: int = 0, client: int = 0
) -> np.random.Generator:
    """Generator of one stream, for draws that happen once a round or less often."""
    counter = [0, 0, client % 2**64, round_id % 2**64]
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, int(purpose)], counter=counter))


def torch_seed(seed: int, purpose: Purpose, index: int = 0) -> int:
    """A 63-bit seed for ``torch.Generator``, drawn from the keyed stream."""
    return int(KeyedStreams(seed, purpose, index).raw(0, 1)[0] >> np.uint64(1))
