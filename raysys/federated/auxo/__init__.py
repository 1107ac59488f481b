"""Auxo: cohorts of similar clients, found while training (Liu et al., SoCC 2023)."""
