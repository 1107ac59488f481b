"""Program of ``test_several_nodes.py``: a federated job on a cluster of four nodes, one removed.

Writes result.json into the given folder: the nodes of the workers before and after, the rounds, a
digest of the final weights with and without the loss.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from actors.federated.driver import FederatedRun
from raysys.federated.core.recipe import FederatedConfig, load_data, make_population
from raysys.runs import RunDirectory

ROUNDS = 300
WORKERS = 2
LOSE_AFTER = 8


def train(
    run_uri: str, on_round: Callable[[int], None], between: Callable[[], None] | None = None
) -> tuple[str, int]:
    """Train; return the digest of the final weights, and how many actors had to be replaced.

    ``between`` runs after round ``LOSE_AFTER``, with all other rounds still to come.
    """
    config = FederatedConfig()
    data = load_data(config.data, config.seed, None)
    population = make_population(config, data)
    spec = config.model.spec(data)
    RunDirectory.create(run_uri, job="test", config={}, seeds=[], now="2026-01-01")
    federated = FederatedRun(
        config, data, population, spec, workers=WORKERS, run_uri=run_uri, checkpoint_every=50
    )
    try:
        have = 0
        if between is not None:
            have = LOSE_AFTER + 1
            for summary in federated.rounds(have):
                on_round(summary.round_id)
            between()
        for summary in federated.rounds(ROUNDS, have):
            on_round(summary.round_id)
        digest = hashlib.sha256(federated.weights().tobytes()).hexdigest()
        return digest, federated.health()["replaced"] + federated.restarts
    finally:
        federated.close()


def living() -> list[dict[str, Any]]:
    """Ray's records of the living actors."""
    actors = ray._private.state.actors().values()
    return [actor for actor in actors if actor["State"] == "ALIVE"]


def worker_nodes() -> list[str]:
    """Nodes of the living worker actors."""
    workers = [actor for actor in living() if actor["ActorClassName"] == "WorkerActor"]
    return sorted(actor["Address"]["NodeID"] for actor in workers)


def lose(cluster: Cluster, victim: Any, limit_s: float = 120.0) -> None:
    """A node dies with all that runs on it.

    Ray's utility ends the node only. Its actors' processes, on the same machine here, would go on
    answering for some seconds, in which a fast machine ends the job with them.
    """
    node = victim.node_id
    processes = [actor["Pid"] for actor in living() if actor["Address"]["NodeID"] == node]
    cluster.remove_node(victim, allow_graceful=False)
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    deadline = time.monotonic() + limit_s
    while node in worker_nodes() and time.monotonic() < deadline:
        time.sleep(0.5)


def wait_for_workers(limit_s: float = 300.0) -> list[str]:
    """Nodes of the workers once both live in Ray's records.

    A worker that still starts is not alive in the records, although rounds are over: the other one
    did them.

    Raises:
        TimeoutError: they do not; it tells Ray's records of all actors.
    """
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        nodes = worker_nodes()
        if len(nodes) >= WORKERS:
            return nodes
        time.sleep(0.5)
    raise TimeoutError(f"{list(ray._private.state.actors().values())}")


def main() -> None:
    """Run the job twice: undisturbed, and with the node of a worker removed half-way."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 10**8},
    )
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=10**8) for _ in range(3)]
    ray.init(address=cluster.address, logging_level="error", log_to_driver=False)
    seen: dict[str, list[str]] = {}
    rounds: list[int] = []
    undisturbed, _ = train(f"{sys.argv[1]}/calm", lambda number: None)

    def lose_a_node() -> None:
        seen["before"] = wait_for_workers()
        victim = next(node for node in nodes if node.node_id == seen["before"][0])
        lose(cluster, victim)

    def note(number: int) -> None:
        rounds.append(number)
        if number == ROUNDS - 1:
            seen["after"] = worker_nodes()

    disturbed, replaced = train(f"{sys.argv[1]}/lost", note, lose_a_node)
    digests = {"undisturbed": undisturbed, "disturbed": disturbed}
    result = {**seen, **digests, "rounds": rounds, "replaced": replaced}
    Path(sys.argv[1], "result.json").write_text(json.dumps(result))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
