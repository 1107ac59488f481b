"""Numeric operations: a reference version, the choice of a version, and the kernel loader."""
