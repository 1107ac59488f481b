"""Andes: engines and replicas of a real endpoint die while streams are open."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.serving import packaged_model
from actors.serving.application import check_vllm
from actors.serving.client import Chat, ChatClient, Stream
from actors.serving.endpoint import free_port
from jobs.bench.faults import processes
from jobs.bench.faults.plan import Tally, draw_blows
from raysys import machine, scratch
from raysys.bench import Claim, Profile
from raysys.errors import RemoteError
from raysys.serving.andes.qoe import QoESpec

SEED = 14
START_S = 540.0
BURST_S = 4.0
STREAMS = 4
VICTIMS = {"engine": r"EngineCore", "replica": r"^ray::ServeReplica.*QoEServer"}
SETTINGS = ("engine.max_model_len=256", "engine.max_num_seqs=8", "engine.kv_tokens=2048")
PROMISE = "every stream ends answered or with an error that is told, and the victim is replaced"


def andes(profile: Profile) -> Claim:
    """The endpoint of ``raysys serve`` under open streams."""
    check_vllm()
    tally = Tally()
    port = free_port()
    with scratch.folder("faults") as folder:
        process = _start(folder, port)
        try:
            client = ChatClient(f"http://127.0.0.1:{port}/v1", packaged_model.NAME)
            _wait_until_answered(client, process, folder)
            blows = draw_blows(SEED, "andes", list(VICTIMS), profile.pick(2, 10))
            rng = random.Random(SEED)
            for blow in blows:
                row = _struck(client, process, blow.victim, blow.moment * BURST_S, rng)
                tally.kills += Counter(row["kills"])
                tally.absent[blow.victim] += not row["kills"]
                again_s = time.monotonic()
                _wait_until_answered(client, process, folder)
                row["answered_again_s"] = time.monotonic() - again_s
                tally.trials.append(row)
        finally:
            family = list(processes.tree(process.pid))
            process.terminate()
            processes.wait_gone(family, 30.0)
            process.wait()
    return tally.claim("andes", PROMISE, SEED)


def outcomes(streams: Sequence[Stream], expected: int) -> dict[str, int]:
    """Streams that were answered, failed with an error that was told, or are not accounted for."""
    failed = sum(stream.error is not None for stream in streams)
    return {
        "answered": len(streams) - failed, "failed": failed, "lost": expected - len(streams)
    }  # fmt: skip


def _chats(count: int, tokens: int) -> list[Chat]:
    spec = QoESpec(ttft_s=2.0, tds=4.0)
    text = "Tell me a story."
    return [Chat(prompt=text, spec=spec, max_tokens=tokens, exact_length=True)] * count


def _struck(
    client: ChatClient, process: Any, victim: str, delay_s: float, rng: random.Random
) -> dict[str, Any]:
    """Open streams, kill, and see how each ends."""
    found: list[Stream] = []
    chats = _chats(STREAMS, 200)
    thread = threading.Thread(target=lambda: found.extend(client.burst(chats)), daemon=True)
    thread.start()
    time.sleep(delay_s)
    running = thread.is_alive()
    killed = running and processes.kill_one(process.pid, VICTIMS[victim], rng, 5.0)
    thread.join(START_S)
    seen = outcomes(found, STREAMS)
    kills = {victim: 1} if killed else {}
    return {"kills": kills, **seen, "held": seen["lost"] == 0, "victim": victim}


def _start(folder: Path, port: int) -> subprocess.Popen[bytes]:
    words = [word for s in (*SETTINGS, f"port={port}") for word in ("--set", s)]
    command = [sys.executable, "-m", "jobs.serve", "--run-dir", str(folder / "run"), *words]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            command, cwd=machine.app_root(), env=environment, stdout=log, stderr=log
        )


def _wait_until_answered(client: ChatClient, process: Any, folder: Path) -> None:
    """Ask until a short chat is answered.

    Raises:
        RemoteError: the program ended, or nothing answered in time.
    """
    end_s = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < end_s:
        if not any(stream.error for stream in client.burst(_chats(1, 2))):
            return
        time.sleep(1.0)
    tail = (folder / "log.txt").read_text(errors="replace")[-600:]
    raise RemoteError("jobs.serve", f"does not answer: {tail}", "See its log")
