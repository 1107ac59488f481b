"""Venn: one population of devices shared by many federated jobs (arXiv 2312.08298)."""
