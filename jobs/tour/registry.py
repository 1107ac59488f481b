"""Finds the stages: every module in ``jobs/tour/stages``, in the tour's order."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence

from jobs.tour import stages as package
from jobs.tour.stage import Stage
from raysys.errors import ConfigError

# Serving comes first because a reader knows it best; the rest follows the README's table.
ORDER = (
    "serving",
    "lte",
    "kgt",
    "ccs",
    "fiited",
    "federated",
    "venn",
    "auxo",
    "fedtrans",
    "fed_ensemble",
    "swan",
)


def stage_names() -> list[str]:
    """Names of the stages in the house, in the tour's order."""
    found = [module.name for module in pkgutil.iter_modules(package.__path__)]
    known = [name for name in ORDER if name in found]
    return known + sorted(set(found) - set(known))


def load_stages(names: Sequence[str]) -> list[Stage]:
    """Import the named stages; an empty sequence means all.

    Raises:
        ConfigError: there is no such stage.
    """
    available = stage_names()
    for name in names:
        if name not in available:
            raise ConfigError("stages", name, "names among " + ", ".join(available))
    chosen = [name for name in available if not names or name in names]
    return [importlib.import_module(f"{package.__name__}.{name}").STAGE for name in chosen]
