"""Coreset selection as a program: score, select, report."""
