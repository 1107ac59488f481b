"""Flower (flwr) on our engine, and our strategies in Flower.

Flower is not among our requirements, since its pins exclude ours; ``requirements/flower.txt`` says
how the two live in one environment, and :func:`require_flower` what to do where it is missing.
"""

from __future__ import annotations

import importlib.util

from raysys.errors import CapabilityError


def require_flower() -> None:
    """Raise a CapabilityError unless ``flwr`` can be imported."""
    if importlib.util.find_spec("flwr") is None:
        raise CapabilityError(
            "Flower", "flwr is not installed",
            "pip install --no-deps -r requirements/flower.txt",
        )  # fmt: skip


require_flower()
