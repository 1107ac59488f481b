"""Benchmarks: one module a system, with ``CLAIMS`` and ``CONFIG``."""
