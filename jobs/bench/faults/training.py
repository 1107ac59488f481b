"""KGT, CCS, FIITED and LTE: training drivers, Ray tasks and Ray Train workers die."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from jobs.bench.faults.program import Program, newer_file, shoot, titled
from jobs.bench.inputs import write_clicks, write_language_model
from raysys import machine, scratch
from raysys.bench import Claim, Profile
from raysys.errors import RemoteError
from raysys.runs import RunDirectory

SEED = 12
CLICKS = 150_000
PROMISE = "the result equals that of an undisturbed run, bit by bit"


def kgt(profile: Profile) -> Claim:
    """``raysys train`` with freezing; the driver dies and is resumed."""
    settings = (
        "recipe.epochs=20", "recipe.batch_size=128", "recipe.lr=0.02", "network.widths=[8,8,16]",
        "kgt.window=2", "kgt.every=2", "kgt.bootstrap_rate=10", "kgt.reference=fp32", "kgt.coef=5",
        "kgt.modules=64", "kgt.pattern=stem|blocks[.].|head", "checkpoint_every=5",
    )  # fmt: skip

    def digest(folder: Path) -> str:
        import torch

        saved = RunDirectory.open(str(folder / "run")).load_checkpoint()
        if saved is None:
            return "no checkpoint"
        path = folder / "state.pt"
        path.write_bytes(next(iter(saved[1].values())))
        return _of_tensors(torch.load(path, weights_only=True)["model"])

    return _measure(
        profile, "kgt", ("jobs.train",), lambda base, folder: settings, {}, "checkpoints/*", digest
    )


def fiited(profile: Profile) -> Claim:
    """``raysys embed train``; the driver dies and is resumed."""

    def settings(base: Path, folder: Path) -> list[str]:
        path = base / "clicks.parquet"
        if not path.exists():
            write_clicks(path, CLICKS, 2000)
        return [f"data={path}", "batch=64", "window=20", "rows=2000", "save_every=2"]

    def digest(folder: Path) -> str:
        import torch

        latest = folder / "run/latest"
        found = hashlib.sha256((latest / "position.json").read_bytes())
        for part in json.loads((latest / "tables/manifest.json").read_text())["parts"]:
            found.update(_rows_in_order(latest / "tables" / part["name"], part))
        dense = torch.load(latest / "dense.pt", weights_only=True)
        return hashlib.sha256((found.hexdigest() + _of_tensors(dense)).encode()).hexdigest()

    words = ("jobs.embed", "train")
    return _measure(profile, "fiited", words, settings, {}, "latest", digest)


def _rows_in_order(path: Path, part: dict[str, Any]) -> bytes:
    """A part of the tables with its rows by key: a loaded store keeps them in another order."""
    from raysys.ops import fiited_abi as abi
    from raysys.training.fiited import checkpoint

    arrays = checkpoint.read_arrays(path, part)
    if "entries" not in arrays:
        return path.read_bytes()
    entries = arrays["entries"].view(abi.ENTRY)
    chunks = np.bitwise_count(entries["alive"] & abi.ALIVE_MASK).astype(np.int64)
    lengths = chunks * (len(arrays["values"]) // max(int(chunks.sum()), 1))
    ends = np.cumsum(lengths)
    order = np.lexsort((entries["key"], entries["table"]))
    values = [arrays["values"][ends[row] - lengths[row] : ends[row]] for row in order]
    utils = arrays["utils"].reshape(len(entries), -1)
    known = [entries[name][order].tobytes() for name in abi.ENTRY.names or () if name != "slot"]
    return b"".join([*known, utils[order].tobytes(), *(v.tobytes() for v in values)])


def ccs(profile: Profile) -> Claim:
    """``raysys coreset score``; the scoring task or the driver dies."""
    settings = (
        "proxy.channels=[4,8,8]", "proxy.iterations=60", "proxy.score_iterations=500",
        "proxy.batch=64",
    )  # fmt: skip

    def digest(folder: Path) -> str:
        table = pq.read_table(folder / "run/scores.parquet")
        return hashlib.sha256(repr(table.to_pydict()).encode()).hexdigest()

    task = r"^ray::scoring_task"
    words = ("jobs.coreset", "score")
    victims = {"task": task}
    return _measure(profile, "ccs", words, lambda base, folder: settings, victims, "", digest, task)


def lte(profile: Profile) -> Claim:
    """``raysys lte train``; a Ray Train worker, its controller or the driver dies."""

    def settings(base: Path, folder: Path) -> list[str]:
        if not (base / "lte").exists():
            _write_model(base)
        return [
            f"model={base / 'lte'}", f"out={folder / 'trained'}", "text.corpus=folder",
            f"text.folder={base / 'text'}", "text.tokens=bytes", "text.seq_len=16",
            "text.held_out=4", "stage.steps=400", "stage.batch=2", "checkpoint_every=20",
        ]  # fmt: skip

    def digest(folder: Path) -> str:
        found = hashlib.sha256()
        for path in sorted((folder / "trained").glob("*.safetensors")):
            found.update(path.read_bytes())
        return found.hexdigest()

    victims = {"worker": r"^ray::.*RayTrainWorker"}
    mark = "ray-train/stage/checkpoint_*"
    return _measure(profile, "lte", ("jobs.lte", "train"), settings, victims, mark, digest)


def _measure(
    profile: Profile, system: str, words: tuple[str, ...],
    settings: Callable[[Path, Path], Any], victims: dict[str, str], mark: str,
    digest: Callable[[Path], str], title: str = "",
) -> Claim:  # fmt: skip
    trials, each = profile.pick((1, 2), (10, 2))
    with scratch.folder("faults") as base:
        program = Program(
            system=system, words=words, settings=lambda folder: settings(base, folder),
            victims=victims, sign=titled(title) if title else newer_file(mark), digest=digest,
        )  # fmt: skip
        return shoot(program, base / "trials", SEED, trials, each).claim(system, PROMISE, SEED)


def _of_tensors(state: Any) -> str:
    """Hash of tensors and plain values in nested dicts and lists."""
    found = hashlib.sha256()

    def visit(value: Any) -> None:
        if isinstance(value, dict):
            for name in sorted(value, key=str):
                found.update(str(name).encode())
                visit(value[name])
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)
        elif hasattr(value, "numpy"):
            found.update(value.detach().contiguous().numpy().tobytes())
        else:
            found.update(repr(value).encode())

    visit(state)
    return found.hexdigest()


def _write_model(base: Path) -> None:
    """A tiny language model with experts, and a little text."""
    write_language_model(base / "dense", base / "text")
    given = [f"model={base / 'dense'}", f"out={base / 'lte'}", "options.expert_size=8"]
    words = [word for one in given for word in ("--set", one)]
    command = [sys.executable, "-m", "jobs.lte", "convert", "--run-dir", str(base / "convert")]
    done = subprocess.run(
        [*command, *words], cwd=machine.app_root(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RemoteError("jobs.lte convert", done.stderr[-600:], "See its output")
