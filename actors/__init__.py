"""Thin Ray wrappers around the cores in ``raysys``; the only home of ray, vllm and grpc."""
