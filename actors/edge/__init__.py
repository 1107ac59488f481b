"""Federated training on devices that are plain processes: server, client, simulated fleet."""
