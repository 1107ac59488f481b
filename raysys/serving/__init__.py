"""Serving systems: Andes (QoE-aware text streaming)."""
