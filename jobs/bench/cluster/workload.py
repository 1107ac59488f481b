"""Small runs of every job, with the files that they need."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jobs.bench.cluster.nodes import free_ports
from jobs.bench.inputs import write_clicks, write_language_model

CLICKS = 6_000


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """A job to submit.

    Args:
        name: unique. words: what follows ``python -m``.
        uses: earlier submissions whose results or services it needs.
        port: where it listens, for a service; 0 for a job that ends by itself.
    """

    name: str
    words: Sequence[str]
    uses: Sequence[str] = ()
    port: int = 0


def submissions(folder: Path, *, full: bool) -> list[Submission]:
    """Every job, in an order in which each finds what it needs; ``full`` adds the engines."""
    jobs = [*_federated(folder), *_training(folder), *_venn(folder)]
    return [*jobs, *_house(folder), *(_engines() if full else [])]


def _federated(folder: Path) -> list[Submission]:
    small = {"rounds": 10, "recipe.partition.clients": 20, "recipe.clients_per_round": 5}
    run, (port,) = folder / "ensemble", free_ports(1)
    return [
        _submission("federate", "jobs.federate", small, run=folder / "federate"),
        _submission("federate: ensemble", "jobs.federate", {**small, "ensemble.k": 2}, run=run),
        _submission(
            "predict", "jobs.predict", {"run": run, "port": port},
            uses=["federate: ensemble"], port=port,
        ),
        Submission(name="report", words=["jobs.report", str(run)], uses=["federate: ensemble"]),
    ]  # fmt: skip


def _training(folder: Path) -> list[Submission]:
    proxy = {"proxy.channels": [4, 8, 8], "proxy.iterations": 30, "proxy.score_iterations": 60}
    scores, coreset = folder / "scores", folder / "coreset"
    table = f"{scores}/scores.parquet"
    data = {"data.name": "digits"}
    score = _submission("coreset score", "jobs.coreset score", proxy, run=scores)
    select = _submission(
        "coreset select", "jobs.coreset select", {"scores": [table], "alpha": 0.9, "beta": 0.1},
        run=coreset, uses=["coreset score"],
    )  # fmt: skip
    report = _submission(
        "coreset report", "jobs.coreset report",
        {**proxy, **data, "coreset": coreset / "coreset", "scores": table, "seeds": 1},
        uses=["coreset select"],
    )  # fmt: skip
    train = _submission(
        "train", "jobs.train",
        {"recipe.epochs": 2, "network.widths": [4, 4, 8], "data.train_rows": 512},
    )  # fmt: skip
    return [train, score, select, report, *_embed(folder), *_lte(folder)]


def _embed(folder: Path) -> list[Submission]:
    clicks, run, model = folder / "clicks.parquet", folder / "embed", folder / "embed-model"
    write_clicks(clicks, CLICKS, 400)
    (port,) = free_ports(1)
    settings = {"batch": 128, "window": 5, "rows": 500, "save_every": 2}
    parallel = {**settings, "data": clicks, "interval": 10, "workers": 2, "shards": 2}
    return [
        _submission("embed train", "jobs.embed train", {**settings, "data": clicks}, run=run),
        _submission("embed train: shards", "jobs.embed train", parallel, run=folder / "shards"),
        _submission(
            "embed export", "jobs.embed export", {"run": run, "out": model}, uses=["embed train"]
        ),
        _submission(
            "embed serve", "jobs.embed serve", {"model": model, "port": port},
            uses=["embed export"], port=port,
        ),
    ]  # fmt: skip


def _lte(folder: Path) -> list[Submission]:
    dense, text = folder / "dense", folder / "text"
    write_language_model(dense, text)
    start, trained = folder / "lte-0", folder / "lte-1"
    corpus = {
        "text.corpus": "folder", "text.folder": text, "text.tokens": "bytes", "text.seq_len": 16,
        "text.held_out": 4,
    }  # fmt: skip
    stage = {"model": start, "stage.steps": 4, "stage.batch": 2, **corpus}
    sweep = {**stage, "out": folder / "etas", "stage2_steps": 2, "etas": [0.01, 0.1]}
    shape = {"hidden": 64, "neurons": 128, "batches": [1], "repeats": 1}
    return [
        _submission(
            "lte convert", "jobs.lte convert",
            {"model": dense, "out": start, "options.expert_size": 8},
        ),
        _submission(
            "lte train", "jobs.lte train", {**stage, "out": trained, "workers": 2},
            uses=["lte convert"],
        ),
        _submission("lte sweep", "jobs.lte sweep", sweep, uses=["lte convert"]),
        _submission(
            "lte eval", "jobs.lte eval", {"model": trained, "decode_tokens": 4, **corpus},
            uses=["lte train"],
        ),
        _submission("lte inspect", "jobs.lte inspect", {"model": trained}, uses=["lte train"]),
        _submission("lte bench", "jobs.lte bench", shape),
    ]  # fmt: skip


def _venn(folder: Path) -> list[Submission]:
    scheduler, gateway, edge = free_ports(3)
    at = f"127.0.0.1:{scheduler}"
    small = {"jobs": 8, "scale_devices": 40, "scale_rounds": 80, "devices": 2700}
    serve = {
        "folder": folder / "venn", "cluster.scheduler_port": scheduler,
        "cluster.gateway_port": gateway, "cluster.gateways": 1, "cluster.standby": False,
    }  # fmt: skip
    load = {
        "scheduler": at, "gateways": f"127.0.0.1:{gateway}", "load.processes": 1,
        "load.duration_s": 2, "load.jobs": 4, "load.rate_per_s": 5000,
    }  # fmt: skip
    joined = {
        "server": f"127.0.0.1:{edge}", "count": 20, "updates": 4, "duration_s": 60,
        "samples.split.clients": 20,
    }  # fmt: skip
    return [
        _submission("venn simulate", "jobs.venn simulate", {**small, "workloads": ["low"]}),
        _submission("venn serve", "jobs.venn serve", serve, port=scheduler),
        _submission("venn load", "jobs.venn load", load, uses=["venn serve"]),
        _submission("venn top", "jobs.venn top", {"scheduler": at, "updates": 2},
                    uses=["venn serve"]),
        _submission(
            "device serve", "jobs.device serve",
            {"listen": f"127.0.0.1:{edge}", "venn.folder": folder / "edge", "rounds": 50,
             "recipe.clients_per_round": 2},
            port=edge,
        ),
        _submission("device simulate", "jobs.device simulate", joined, uses=["device serve"]),
    ]  # fmt: skip


def _house(folder: Path) -> list[Submission]:
    log = folder / "steps.jsonl"
    _write_step_log(log)
    bench = ["jobs.bench", "venn", "--only", "plan_ms"]
    tour = ["jobs.tour", "--profile", "smoke", "--set", "stages=[fed_ensemble]"]
    compose = {"rounds": 4, "hidden": [16], "clients": 20, "per_round": 5, "seeds": 2}
    return [
        _submission("compose", "jobs.compose kgt_in_clients", compose, run=folder / "compose"),
        _submission("calibrate", "jobs.calibrate", {"log": log}),
        Submission(name="bench", words=bench),
        Submission(name="tour", words=[*tour, "--run-dir", str(folder / "tour")]),
    ]


def _engines() -> list[Submission]:
    (port,) = free_ports(1)
    address = f"http://127.0.0.1:{port}/v1"
    ask = {"url": address, "prompt": "Why is the sky blue?", "max_tokens": 8, "paced": False}
    return [
        _submission("serve", "jobs.serve", {"port": port}, port=port),
        _submission("chat", "jobs.chat", ask, uses=["serve"]),
    ]


def _submission(
    name: str,
    program: str,
    settings: Mapping[str, Any],
    *,
    run: Path | None = None,
    uses: Sequence[str] = (),
    port: int = 0,
) -> Submission:
    pairs = [f"{key}={_word(value)}" for key, value in settings.items()]
    words = [*program.split(), *(word for pair in pairs for word in ("--set", pair))]
    if run is not None:
        words += ["--run-dir", str(run)]
    return Submission(name=name, words=words, uses=uses, port=port)


def _word(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ",".join(map(str, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _write_step_log(path: Path) -> None:
    """Steps of an engine of known cost, two per cent noise."""
    rng = np.random.default_rng(1)
    lines = []
    for step in range(400):
        batch, prefill = int(rng.integers(1, 20)), int(rng.integers(0, 200) * (step % 4 == 0))
        seconds = (0.04 + 0.002 * batch + 5e-4 * prefill) * (1 + 0.02 * rng.standard_normal())
        entry = {"batch": batch, "prefill_tokens": prefill, "context_tokens": 300 * batch}
        lines.append(json.dumps({**entry, "seconds": seconds}))
    path.write_text("\n".join(lines))
