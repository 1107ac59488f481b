"""LTE: turn a dense language model into one that has learned to use few of its neurons.

Zheng et al., "Learn To be Efficient: Build Structured Sparsity in Large Language Models",
NeurIPS 2024.
"""
