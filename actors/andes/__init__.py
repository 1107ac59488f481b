"""Andes on the real engine: the vLLM scheduler adapter and what Ray Serve needs around it."""
