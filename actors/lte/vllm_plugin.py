"""Registers LTE's model class with vLLM; imports neither torch nor the class itself.

With ``VLLM_PLUGINS`` set, vLLM loads only what it names: it must contain ``raysys_lte``.
"""

from __future__ import annotations

ARCHITECTURE = "LTELlamaForCausalLM"
CLASS = "actors.lte.vllm_model:LTELlamaForCausalLM"


def register() -> None:
    """Name the class in vLLM's registry, as text, so that nothing heavy is imported."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, CLASS)
