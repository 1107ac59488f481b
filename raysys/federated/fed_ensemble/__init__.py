"""Fed-ensemble (Shi et al., IEEE T-ASE 2024, arXiv 2107.10663): K models for the price of one."""
