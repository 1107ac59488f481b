"""Venn's live service: gRPC gateways, the scheduler with log and standby, clients."""
