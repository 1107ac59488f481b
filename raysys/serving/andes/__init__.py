"""Andes: QoE-aware serving of streamed text (arXiv 2404.16283)."""
