"""Auxo's cohorts as ensemble members: who is mixed how."""

from __future__ import annotations

import numpy as np
import pytest

from raysys.compose.cohort_members import CohortEnsemble
from raysys.errors import ConfigError
from raysys.federated.auxo.auxo import STRIDE, Auxo
from raysys.federated.auxo.config import AuxoConfig
from raysys.federated.auxo.planted import Planted, PlantedConfig, plant
from raysys.federated.core.datasets import load_digits_data
from raysys.federated.core.engine import FederatedJob
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.local import LocalConfig
from raysys.federated.core.model import Mlp, ModelSpec
from raysys.federated.core.runner import run_round

SPEC = ModelSpec(architecture=Mlp(sizes=(64, 16, 10)))
LOCAL = LocalConfig(epochs=1, batch_size=10, lr=0.1)
ROUNDS = 32


@pytest.fixture(scope="module")
def trained() -> tuple[Auxo, Planted]:
    """Two groups with contradicting labels, split by Auxo."""
    case = PlantedConfig(kind="labels", groups=2, clients=200, samples=40, alpha=100.0)
    data = plant(load_digits_data(0, image=True), case, 0)
    auxo = Auxo(AuxoConfig(k_max=2), 60, lambda: FedAvg(SPEC, LOCAL, 60))
    job = FederatedJob(auxo, data.population, 0)
    samples = data.data.samples()
    for _ in range(ROUNDS):
        run_round(job, samples)
    return auxo, data


def test_members_are_the_cohorts_and_known_clients_get_their_own(
    trained: tuple[Auxo, Planted],
) -> None:
    auxo, data = trained
    ensemble = CohortEnsemble(auxo)
    assert len(ensemble.members) == len(auxo.tree.leaves) == 2
    known = np.flatnonzero(auxo.table.known(np.arange(200)))
    right = []
    for client in known[:40].tolist():
        mixing = ensemble.mixing(client)
        assert mixing.sum() == pytest.approx(1.0)
        assert int(mixing.argmax()) == ensemble.leaves.index(
            int(auxo.best_leaves(np.array([client]))[0])
        )
        group = data.group_of[client]
        labels = ensemble.predict(data.test_inputs[group], mixing).labels
        right.append(float((labels == data.test_targets[group]).mean()))
    assert np.mean(right) > 0.7
    uniform = [
        float((ensemble.predict(view).labels == truth).mean())
        for view, truth in zip(data.test_inputs, data.test_targets)
    ]
    assert np.mean(right) > np.mean(uniform) + 0.1  # groups contradict one another


def test_labels_of_an_unknown_client_lead_to_its_cohort(trained: tuple[Auxo, Planted]) -> None:
    auxo, data = trained
    ensemble = CohortEnsemble(auxo)
    unknown = 10_000
    np.testing.assert_allclose(ensemble.mixing(unknown), [0.5, 0.5])
    assert ensemble.predict(data.test_inputs[0]).mutual_information.mean() > 0.05
    picks = []
    for group in (0, 1):
        inputs, labels = data.test_inputs[group][:20], data.test_targets[group][:20]
        weights = ensemble.personal(inputs, labels)
        assert weights.max() > 0.8
        picks.append(int(weights.argmax()))
    assert sorted(picks) == [0, 1]


def test_members_of_different_shapes_are_refused(
    trained: tuple[Auxo, Planted], monkeypatch: pytest.MonkeyPatch
) -> None:
    auxo, _ = trained
    monkeypatch.setattr(
        auxo,
        "model_spec",
        lambda model: ModelSpec(architecture=Mlp(sizes=(64, 16 + model // STRIDE, 10))),
    )
    with pytest.raises(ConfigError, match="cohorts"):
        CohortEnsemble(auxo)
