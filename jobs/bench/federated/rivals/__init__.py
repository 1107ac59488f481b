"""Other engines on the same job, each a program of its own in an environment of its own."""
