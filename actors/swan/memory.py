"""Telling that memory ran out from other failures of a step."""

from __future__ import annotations

import torch

# How torch's CPU allocator ends its complaints; it raises a plain RuntimeError.
ALLOCATOR = "you tried to allocate"


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception of a training step means that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and ALLOCATOR in str(error)
