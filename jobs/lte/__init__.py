"""The job ``raysys lte``."""
