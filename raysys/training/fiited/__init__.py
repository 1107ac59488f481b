"""FIITED: rows of embedding tables get the length that they deserve, while training runs.

Luo et al., "Fine-Grained Embedding Dimension Optimization During Training for Recommender
Systems" (arXiv 2401.04408). What the paper does not state is our choice; see docs/fiited.md.
"""

from __future__ import annotations

from raysys.training.fiited.bag import FiitedEmbeddingBag, convert, hash_strings
from raysys.training.fiited.config import FiitedConfig, TableSpec
from raysys.training.fiited.store import FiitedStore

__all__ = [
    "FiitedConfig",
    "FiitedEmbeddingBag",
    "FiitedStore",
    "TableSpec",
    "convert",
    "hash_strings",
]
