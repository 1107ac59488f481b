"""LTE on Ray and in vLLM."""
