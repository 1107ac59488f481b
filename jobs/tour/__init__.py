"""The tour: one small, real demonstration of every system."""
