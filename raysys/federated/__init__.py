"""Federated learning: the shared core and the systems built on it."""
