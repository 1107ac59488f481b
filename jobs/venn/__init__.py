"""Programs of Venn: serve, load, top."""
