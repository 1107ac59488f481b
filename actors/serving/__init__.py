"""Serving text models with Ray Serve's LLM application and vLLM, and measuring it at the client."""
