"""Programs to run: ``python -m jobs.NAME``, the same as ``raysys NAME``."""
