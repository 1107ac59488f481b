"""The digits job through pfl-research's public API; run by the benchmark in pfl's environment.

    python pfl_job.py job.npz mlp|cnn ROUNDS

Its simulated backend with federated averaging, tensors in memory, one thread, no evaluation on
clients or centrally: as quick as its documentation makes it. Prints one JSON line.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import nn

JOB, KIND, ROUNDS = sys.argv[1], sys.argv[2], int(sys.argv[3])
COHORT = 100


class Classifier(nn.Module):
    """MLP 64-64-10, or a CNN with 8 and 16 channels, with pfl's loss and metrics methods."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == "mlp":
            layers = [nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
        else:
            layers = [
                nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                nn.Flatten(), nn.Linear(64, 10),
            ]  # fmt: skip
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> Any:
        """Logits."""
        return self.layers(x)

    def loss(self, x: torch.Tensor, y: torch.Tensor, is_eval: bool = False) -> Any:
        """Mean cross-entropy."""
        del is_eval
        return nn.functional.cross_entropy(self(x), y)

    def metrics(self, x: torch.Tensor, y: torch.Tensor, is_eval: bool = True) -> dict[str, Any]:
        """None: nothing is evaluated."""
        del x, y, is_eval
        return {}


class Marks(TrainingProcessCallback):  # type: ignore[misc]
    """Wall and CPU time after every central iteration."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, float]] = []

    def after_central_iteration(
        self, aggregate_metrics: Any, model: Any, *, central_iteration: int
    ) -> tuple[bool, Any]:
        """Note the time; never stop."""
        del aggregate_metrics, model, central_iteration
        self.rows.append((time.perf_counter(), time.process_time()))
        return False, Metrics()


def main() -> None:
    """Run the job and print its figures."""
    torch.set_num_threads(1)
    with np.load(JOB) as job:
        inputs, targets, rows = job["inputs"], job["targets"], job["rows"]
    x, y = torch.from_numpy(inputs), torch.from_numpy(targets)
    users = {
        user: Dataset(raw_data=[x[own], y[own]], user_id=str(user))
        for user, own in enumerate(torch.from_numpy(rows))
    }
    sampler = get_user_sampler("random", list(users))
    module = Classifier(KIND)
    model = PyTorchModel(
        module,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
    )
    marks = Marks()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=ROUNDS + 1,
            evaluation_frequency=10**9,
            train_cohort_size=COHORT,
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(
            training_data=FederatedDataset(users.__getitem__, sampler), val_data=None
        ),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=0.1, local_batch_size=10
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=None),
        callbacks=[marks],
        send_metrics_to_platform=False,
    )
    (wall, cpu), (wall_end, cpu_end) = marks.rows[0], marks.rows[-1]
    clients = COHORT * (len(marks.rows) - 1)
    print(json.dumps({"clients": clients, "wall_s": wall_end - wall, "cpu_s": cpu_end - cpu}))


if __name__ == "__main__":
    main()
