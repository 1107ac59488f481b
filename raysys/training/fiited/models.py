"""Click models on top of pooled embeddings: DLRM (dot interactions) and DeepFM.

Both take the concatenated embeddings [B, sum D_t] (all tables of one width) and optional dense
features [B, X]; the embedding layer itself stays outside, so every method under comparison trains
the same dense network.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raysys.errors import ConfigError


class DLRM(nn.Module):
    """Naumov et al. 2019: bottom net, pairwise dot products, top net. Logits [B]."""

    def __init__(self, fields: int, dim: int, dense: int = 0, hidden: int = 64) -> None:
        super().__init__()
        self.fields, self.dim = fields, dim
        self.bottom = _mlp(dense, hidden, dim) if dense else None
        vectors = fields + (dense > 0)
        left, right = torch.tril_indices(vectors, vectors, -1)
        self.register_buffer("left", left)
        self.register_buffer("right", right)
        self.top = _mlp(fields * dim + len(left) + (dim if dense else 0), hidden, 1)

    def forward(self, embeddings: Tensor, dense: Tensor | None = None) -> Tensor:
        vectors = embeddings.reshape(len(embeddings), self.fields, self.dim)
        if self.bottom is not None:
            if dense is None:
                raise ConfigError("dense", None, "dense features, as at construction")
            bottom = self.bottom(dense)
            vectors = torch.cat([vectors, bottom[:, None]], 1)
        products = torch.bmm(vectors, vectors.transpose(1, 2))
        left, right = self.get_buffer("left"), self.get_buffer("right")
        features = torch.cat([vectors.flatten(1), products[:, left, right]], 1)
        logits: Tensor = self.top(features).squeeze(1)
        return logits


class DeepFM(nn.Module):
    """Guo et al. 2017, with the first-order term read from the first coordinate. Logits [B]."""

    def __init__(self, fields: int, dim: int, dense: int = 0, hidden: int = 64) -> None:
        super().__init__()
        self.fields, self.dim = fields, dim
        self.deep = _mlp(fields * dim + dense, hidden, 1)

    def forward(self, embeddings: Tensor, dense: Tensor | None = None) -> Tensor:
        vectors = embeddings.reshape(len(embeddings), self.fields, self.dim)
        linear = vectors[:, :, 0].sum(1)
        rest = vectors[:, :, 1:]
        second = 0.5 * (rest.sum(1) ** 2 - (rest**2).sum(1)).sum(1)
        inputs = embeddings if dense is None else torch.cat([embeddings, dense], 1)
        logits: Tensor = linear + second + self.deep(inputs).squeeze(1)
        return logits


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
