"""Two equal federated jobs that are submitted together, against one that has the cluster alone."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from jobs.bench.cluster.nodes import Ended, NodeCluster, in_own_home, several_nodes
from raysys import scratch
from raysys.bench import Baseline, Claim, Profile
from raysys.errors import RemoteError

NODES = 2
CPUS = 2
WORKERS = 2
LIMIT_S = 900.0


def two_jobs_share(profile: Profile) -> Claim:
    """The time of the later one of two equal jobs over that of the earlier: 1 is an even share.

    Each asks for two workers of one CPU, together all that the cluster has.
    """
    rounds, repeats = profile.pick((40, 1), (200, 3))
    trials = in_own_home(_measure, rounds, repeats)
    ratios = [max(trial["together"]) / min(trial["together"]) for trial in trials]
    return Claim(
        name="two_jobs_share",
        value=statistics.median(ratios),
        unit="time of the later job over that of the earlier",
        better="lower",
        baseline=Baseline(name="even share", value=1.0),
        ratio=statistics.median(ratios),
        samples={"trials": trials, "rounds": rounds},
        seeds=[0],
    )


def _measure(rounds: int, repeats: int) -> list[dict[str, Any]]:
    with scratch.folder("cluster") as folder, several_nodes(NODES, CPUS) as cluster:
        return [_trial(cluster, folder / str(n), rounds) for n in range(repeats)]


def _trial(cluster: NodeCluster, folder: Path, rounds: int) -> dict[str, Any]:
    alone = [_finish(cluster, _submit(cluster, folder / "alone", rounds))]
    jobs = [_submit(cluster, folder / name, rounds) for name in ("one", "two")]
    together = [_finish(cluster, job) for job in jobs]
    return {
        "alone": alone[0].seconds,
        "together": [ended.seconds for ended in together],
        "nodes": [ended.nodes for ended in (*alone, *together)],
    }


def _submit(cluster: NodeCluster, run: Path, rounds: int) -> str:
    settings = [f"rounds={rounds}", f"workers={WORKERS}", "evaluate_every=0"]
    words = [word for setting in settings for word in ("--set", setting)]
    return cluster.submit(["jobs.federate", *words, "--run-dir", str(run)])


def _finish(cluster: NodeCluster, job: str) -> Ended:
    cluster.wait(job, LIMIT_S)
    ended = cluster.ended(job)
    if ended.status != "SUCCEEDED":
        raise RemoteError(f"job {job}", ended.log)
    return ended
