"""Faults: SIGKILL at random moments, for each of the ten systems and the federated core.

Each claim is the share of disturbed runs that kept the system's promise. Its samples hold the
count of kills by kind of victim; a kill that came after the end is counted as late and proves
nothing. See docs/operations.md, "Faults".
"""

from jobs.bench.faults import federated, services, training
from jobs.bench.faults.endpoint import andes

CONFIG = {
    "signal": "SIGKILL",
    "moments": "drawn from the seed as shares of an undisturbed run's time of work",
    "federated": {name: list(lines) for name, lines in federated.SETTINGS.items()},
}

CLAIMS = {
    "federated": federated.claim_of("federated"),
    "auxo": federated.claim_of("auxo"),
    "fedtrans": federated.claim_of("fedtrans"),
    "fed_ensemble": federated.claim_of("fed_ensemble"),
    "kgt": training.kgt,
    "ccs": training.ccs,
    "fiited": training.fiited,
    "lte": training.lte,
    "venn": services.venn,
    "swan": services.swan,
    "andes": andes,
}
