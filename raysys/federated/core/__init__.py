"""The federated core: populations, local training, aggregation, rounds. Strategies go on top.

Systems of the family import the modules of this package; see ``docs/federated.md``.
"""
