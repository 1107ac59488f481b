"""The digits job through Flower's public API; run by the benchmark in Flower's environment.

    python flower_job.py job.npz mlp|cnn ROUNDS

Written as Flower's own PyTorch quickstart: a ClientApp that loads the global weights, trains its
partition and returns the weights, a ServerApp with FedAvg. Data and model are kept by each worker
process between clients, which the quickstart does not do. Prints one JSON line.
"""

from __future__ import annotations

import builtins
import json
import os
import sys
import time
from typing import Any

import numpy as np
import psutil
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.server import Grid
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import nn

JOB, KIND, ROUNDS = sys.argv[1], sys.argv[2], int(sys.argv[3])
POPULATION, SHARE = 1000, 0.1
client_app = ClientApp()
server_app = ServerApp()
marks: list[tuple[float, float]] = []


def build(kind: str) -> nn.Module:
    """MLP 64-64-10, or a CNN with 8 and 16 channels."""
    if kind == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def kept(path: str, kind: str) -> tuple[Any, Any, Any, nn.Module]:
    """Samples, clients and module, once per process.

    This module travels by value with every message; what shall stay needs one that does not.
    """
    store: dict[str, Any] = builtins.__dict__.setdefault("_kept_job", {})
    if not store:
        torch.set_num_threads(1)
        with np.load(path) as job:
            inputs, targets, rows = job["inputs"], job["targets"], job["rows"]
        store["job"] = torch.from_numpy(inputs), torch.from_numpy(targets), rows, build(kind)
    found: tuple[Any, Any, Any, nn.Module] = store["job"]
    return found


@client_app.train()  # type: ignore[untyped-decorator]
def train(message: Message, context: Context) -> Message:
    """One local epoch of plain SGD."""
    settings = message.content["config"]
    inputs, targets, rows, module = kept(str(settings["job"]), str(settings["kind"]))
    module.load_state_dict(message.content["arrays"].to_torch_state_dict())
    own = torch.from_numpy(rows[int(context.node_config["partition-id"])])
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    for batch in torch.split(own[torch.randperm(len(own))], 10):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(module(inputs[batch]), targets[batch])
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    metrics = MetricRecord({"train_loss": float(loss.detach()), "num-examples": len(own)})
    arrays = ArrayRecord(module.state_dict())
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def mark(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
    """Note wall and CPU time of the process tree between rounds."""
    del server_round, arrays
    marks.append((time.perf_counter(), tree_cpu_s()))
    return None


def tree_cpu_s() -> float:
    """CPU seconds of this process and all below it, those that ended included."""
    me = psutil.Process(os.getpid())
    total = 0.0
    for process in [me, *me.children(recursive=True)]:
        try:
            spent = process.cpu_times()
        except psutil.Error:
            continue
        total += spent.user + spent.system + spent.children_user + spent.children_system
    return total


@server_app.main()  # type: ignore[untyped-decorator]
def serve(grid: Grid, context: Context) -> None:
    """FedAvg over a tenth of the nodes a round; no evaluation on clients."""
    del context
    from flwr.app import ConfigRecord

    strategy = FedAvg(fraction_train=SHARE, fraction_evaluate=0.0, min_available_nodes=POPULATION)
    strategy.start(
        grid,
        ArrayRecord(build(KIND).state_dict()),
        num_rounds=ROUNDS + 1,
        train_config=ConfigRecord({"job": JOB, "kind": KIND}),
        evaluate_fn=mark,
    )


if __name__ == "__main__":
    run_simulation(
        server_app, client_app, POPULATION,
        backend_config={
            "init_args": {"address": "local", "num_cpus": 2}, "client_resources": {"num_cpus": 1}
        },
    )  # fmt: skip
    (wall, cpu), (wall_end, cpu_end) = marks[1], marks[-1]  # the first round starts the workers
    clients = ROUNDS * int(POPULATION * SHARE)
    print(json.dumps({"clients": clients, "wall_s": wall_end - wall, "cpu_s": cpu_end - cpu}))
