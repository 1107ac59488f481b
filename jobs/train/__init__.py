"""The job ``raysys train``."""
