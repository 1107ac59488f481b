"""Programs of the edge: join, simulate, serve, listen, certificates."""
