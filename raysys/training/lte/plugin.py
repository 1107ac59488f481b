"""Entry point by which every vLLM process learns of LTE's model class.

The class itself is in ``actors``, the only home of vLLM; an installed raysys keeps that folder
beside its own packages, so the folder is put on the path here. Safe to run twice.
"""

from __future__ import annotations

import importlib
import sys

from raysys import machine


def register() -> None:
    """Called by vLLM through the entry point group ``vllm.general_plugins``."""
    root = str(machine.app_root())
    if root not in sys.path:
        sys.path.append(root)
    importlib.import_module("actors.lte.vllm_plugin").register()
