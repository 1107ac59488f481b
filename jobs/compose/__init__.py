"""Compositions of several systems as programs."""
