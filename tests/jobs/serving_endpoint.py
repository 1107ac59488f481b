"""One real engine behind ``serve run``, and how tests ask it things."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from actors.andes.engine_settings import read_status
from actors.serving import packaged_model
from actors.serving.client import Chat, ChatClient
from actors.serving.endpoint import free_port
from actors.session import Session
from raysys import machine, scratch
from raysys.serving.andes.qoe import QoESpec

psutil = pytest.importorskip("psutil", reason="comes with the serving extra: make setup")

START_S = 540.0  # 60 s on two idle cores; seen to take 460 s on two that many others used
# Nothing here is about speed: the machine may be busy with other work.
PATIENCE_S = 180.0
KEY = "blue-secret"
DIGEST = hashlib.sha256(KEY.encode()).hexdigest()
ADMISSION = {"max_inflight": 6, "keys": [{"tenant": "blue", "sha256": DIGEST, "weight": 2.0}]}
SPEC = QoESpec(ttft_s=2.0, tds=4.0)


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = PATIENCE_S) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:.0f} s"
        threading.Event().wait(0.25)
    return value


@functools.cache
def status_file() -> Path:
    """Where the engine's scheduler writes; one engine, one file a test run."""
    return scratch.kept("test") / "status.json"


def everything_is_free() -> bool:
    """No request inside the engine and no block in use."""
    status = read_status(status_file())
    return status is not None and status["kv_use"] == status["running"] == status["waiting"] == 0


def engine_processes() -> list[Any]:
    """Engine cores of this test run only: descendants of this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "EngineCore" in " ".join(process.cmdline()) or "EngineCore" in process.name():
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def served_endpoint(
    ray_cluster: Session, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """``serve run jobs.serve:app`` on the shared cluster; yields the base address."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: run `make setup`")
    import ray

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray import serve

        port = free_port()
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    command = [
        str(Path(sys.executable).parent / "serve"), "run", "jobs.serve:app",
        "--name", "llm",
        "engine.max_model_len=256", "engine.max_num_seqs=8", "engine.kv_tokens=2048",
        f"admission={json.dumps(ADMISSION)}", "page=full",
        f"andes.status_file={status_file()}",
    ]  # fmt: skip
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=machine.app_root(), stdout=output, stderr=subprocess.STDOUT,
            env=_environment(ray.get_runtime_context().gcs_address),
        )  # fmt: skip
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(lambda: _ready(url, process, log), "the engine", START_S)
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:  # a busy machine; the application is shut down below
                process.kill()
                process.wait()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                serve.shutdown()


def _environment(address: str) -> dict[str, str]:
    """Ray Serve LLM connects to Ray while the application is built, so --address comes too late.

    The shared cluster is on loopback alone, and a driver that joins it must be told so.
    """
    from ray._private.ray_constants import ENABLE_RAY_CLUSTERS_ENV_VAR

    token = {"RAY_AUTH_MODE": "token"} if machine.has_ray_token() else {}
    loopback = {ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}
    return {**token, **os.environ, **loopback, "RAY_ADDRESS": address}


def _ready(url: str, process: Any, log: Path) -> bool:
    assert process.poll() is None, log.read_text()[-2000:]
    try:
        status, _ = ask(f"{url}/v1/models/{packaged_model.NAME}")
        return status == 200 and chat_once(url)
    except (urllib.error.URLError, OSError):
        return False


def client_of(url: str) -> ChatClient:
    return ChatClient(f"{url}/v1", packaged_model.NAME, KEY)


def chat_once(url: str) -> bool:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    status, _ = ask(f"{url}/v1/chat/completions", {"model": packaged_model.NAME, **body})
    return status == 200


def post(url: str, body: Any = None, **headers: str) -> Any:
    """Send a request with the key; its open response, or an HTTPError."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    sent = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}", **headers}
    request = urllib.request.Request(url, data=data, headers=sent)
    return urllib.request.urlopen(request, timeout=PATIENCE_S)


def ask(url: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    try:
        with post(url, body, **headers) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def chats(count: int, max_tokens: int = 24) -> list[Chat]:
    prompts = ["Name three colours.", "What is a river?", "Tell me a story.", "Why is it dark?"]
    return [
        Chat(prompt=prompts[i % 4], spec=SPEC, max_tokens=max_tokens, exact_length=True)
        for i in range(count)
    ]


def answers(url: str) -> bool:
    """Whether a chat is answered, an endpoint that is down included."""
    try:
        return chat_once(url)
    except OSError:
        return False


@contextmanager
def open_stream(url: str, **more: Any) -> Iterator[socket.socket]:
    """A long answer under way: its first token is there, and more is to come."""
    host, port = url.removeprefix("http://").split(":")
    body = {
        "model": packaged_model.NAME,
        "messages": [{"role": "user", "content": "Tell me a story."}],
        "max_tokens": 200,
        "ignore_eos": True,
        "stream": True,
    }
    data = json.dumps(body | more)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as stream:
        stream.sendall((head + data).encode())
        seen = b""
        while b'"content":"' not in seen.replace(b'"content":""', b""):
            piece = stream.recv(4096)
            assert piece, seen
            seen += piece
        assert seen.startswith(b"HTTP/1.1 200"), seen[:200]
        yield stream
