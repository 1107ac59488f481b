"""Training systems: savings inside an ordinary training run."""
