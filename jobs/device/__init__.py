"""Programs of the edge: join, simulate, serve, certificates."""
