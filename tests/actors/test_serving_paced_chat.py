"""Pacing around the official OpenAI client, blocking and asynchronous; the server is scripted."""

from __future__ import annotations

import asyncio
import http.server
import itertools
import json
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from raysys.serving.andes.paced_chat import AsyncPacedChat, PacedChat, pieces_of
from raysys.serving.andes.spec import QoESpec

openai = pytest.importorskip("openai", reason="comes with the serving extra: make setup")

SPEC = QoESpec(ttft_s=0.0, tds=200.0)
TEXTS = ["The ", "sky ", "is ", "blue, and the sea is too", ""]
SHOWN = ["The ", "sky ", "is ", "blue, ", "and ", "the ", "sea ", "is ", "too"]
ASK: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Why?"}]}


class Handler(http.server.BaseHTTPRequestHandler):
    left: threading.Event

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        texts = itertools.cycle(["on "]) if body["model"] == "endless" else TEXTS
        head = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "m"}
        try:
            for text in texts:
                choices = [
                    {"index": 0, "delta": {"content": text, "reasoning": "hidden"}},
                    {"index": 1, "delta": {"content": "another answer"}},
                ]
                self.wfile.write(
                    b"data: " + json.dumps(head | {"choices": choices}).encode() + b"\n\n"
                )
                self.wfile.flush()
                if body["model"] == "endless":
                    self.left.wait(0.002)
            if body["model"] == "dying":
                self.wfile.write(b'data: {"error": {"message": "the engine failed"}}\n\n')
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.left.set()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Any]:
    handler = type("Scripted", (Handler,), {"left": threading.Event()})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as listener:
        listener.daemon_threads = True
        thread = threading.Thread(target=listener.serve_forever, args=(0.01,))
        thread.start()
        url = f"http://127.0.0.1:{listener.server_address[1]}/v1"
        yield SimpleNamespace(url=url, left=handler.left)
        listener.shutdown()
        thread.join()


def ask(server: Any, model: str = "m") -> tuple[Any, PacedChat]:
    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
    stream = client.chat.completions.create(**ASK | {"model": model}, stream=True)
    return client, PacedChat(stream, SPEC, time.monotonic)


def test_words_of_a_joined_chunk_are_shown_at_their_pace(server: Any) -> None:
    client, answer = ask(server)
    with client, answer:
        assert list(answer) == SHOWN
    report = answer.report()
    gaps = [after - before for before, after in itertools.pairwise(report.shown_s)]
    assert all(gap >= SPEC.tau_s - 1e-9 for gap in gaps)
    assert all(gap >= 1.3 * SPEC.tau_s - 1e-9 for gap in gaps[3:])  # a word is 1.3 tokens
    assert report.unshown == 0


def test_the_asynchronous_client_is_paced_alike(server: Any) -> None:
    async def go() -> tuple[list[str], int]:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
            sent = time.monotonic()
            stream = await client.chat.completions.create(**ASK, stream=True)
            async with AsyncPacedChat(stream, SPEC, time.monotonic, submitted_s=sent) as answer:
                return [piece async for piece in answer], len(answer.report().delivered_s)

    assert asyncio.run(go()) == (SHOWN, len(SHOWN))


def test_leaving_early_tells_the_server(server: Any) -> None:
    client, answer = ask(server, "endless")
    with client, answer:
        assert next(iter(answer)) == "on "
    answer.close()
    assert server.left.wait(60.0)

    async def leave() -> str:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
            stream = await client.chat.completions.create(**ASK | {"model": "endless"}, stream=True)
            async with AsyncPacedChat(stream, SPEC, time.monotonic) as answer:
                return await anext(aiter(answer))

    server.left.clear()
    assert asyncio.run(leave()) == "on "
    assert server.left.wait(60.0)


def test_what_had_arrived_is_shown_before_the_failure(server: Any) -> None:
    client, answer = ask(server, "dying")
    shown: list[str] = []
    with client, pytest.raises(openai.APIError, match="the engine failed"):
        shown.extend(piece for piece in answer)
    assert shown == SHOWN


def test_chunks_of_completions_and_of_nothing() -> None:
    def chunk(**choice: Any) -> Any:
        return SimpleNamespace(choices=[SimpleNamespace(index=0, **choice)])

    assert pieces_of(chunk(text=" one")) == [" one"]
    assert pieces_of(chunk(text=" one")).weight == 1.0
    assert pieces_of(chunk(text="two words")).weight == 1.3
    assert pieces_of(chunk(delta=SimpleNamespace(content=None))) == []
    assert pieces_of(SimpleNamespace(choices=[])) == []
