"""The dense nets by name."""

from __future__ import annotations

import torch
from torch import nn

from raysys.training.fiited.models import DLRM, DeepFM


def build_model(kind: str, fields: int, dim: int, dense: int, hidden: int, seed: int) -> nn.Module:
    """DLRM or DeepFM with seeded weights."""
    torch.manual_seed(seed)
    made = DLRM if kind == "dlrm" else DeepFM
    return made(fields, dim, dense, hidden)
