"""Swan on a real device: what touches the operating system for ``raysys.federated.swan``."""
