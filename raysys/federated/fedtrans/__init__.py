"""FedTrans (Zhu et al., MLSys 2024, arXiv 2404.13515): one small model grows into a family."""
