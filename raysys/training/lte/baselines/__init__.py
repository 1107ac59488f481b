"""The methods that LTE is compared with, as selections for the same gates (see
``lte/gating.py``).
"""
