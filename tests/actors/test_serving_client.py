"""The measuring client against a scripted endpoint: times, tokens, QoE, and every way to fail."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from actors.serving.client import Chat, ChatClient, qoe_fields, require_complete, summarize_burst
from actors.serving.endpoint import free_port
from raysys.errors import RemoteError
from raysys.serving.andes.qoe import QoESpec


def chunk(token_ids: list[int] | None, text: str, finish: str | None = None) -> bytes:
    choice: dict[str, Any] = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    if token_ids is not None:
        choice["token_ids"] = token_ids
    body = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "m"}
    return b"data: " + json.dumps(body | {"choices": [choice]}).encode() + b"\n\n"


SCRIPTS: dict[str, list[bytes]] = {
    "good": [chunk([1], "a"), chunk([2, 3], "bc"), chunk([4], "d", "length"), b"data: [DONE]\n\n"],
    "without ids": [chunk(None, "a"), chunk(None, ""), chunk(None, "b", "stop")],
    "error event": [
        chunk([1], "a"),
        b'data: {"error": {"message": "EngineCore died", "type": "Internal", "code": 500}}\n\n',
        b"data: [DONE]\n\n",
    ],
    "cut": [chunk([1], "a")],
    "empty": [chunk([], "", "stop"), b"data: [DONE]\n\n"],
}


class Handler(http.server.BaseHTTPRequestHandler):
    received: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.received.append(body)
        script = body["messages"][0]["content"]
        if script == "busy":
            self.send_response(429)
            self.send_header("Retry-After", "2")
            self.end_headers()
            self.wfile.write(b'{"error": {"message": "too many requests"}}')
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for piece in SCRIPTS[script]:
            self.wfile.write(piece)
            self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    received: list[dict[str, Any]] = []
    handler = type("Scripted", (Handler,), {"received": received})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as listener:
        thread = threading.Thread(target=listener.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{listener.server_address[1]}/v1", received
        listener.shutdown()
        thread.join()


def test_tokens_times_and_qoe_of_a_good_stream(server: Any) -> None:
    url, received = server
    spec = QoESpec(ttft_s=60.0, tds=4.8, weight=2.0, tenant="blue")
    [stream] = ChatClient(url, "m").burst([Chat(prompt="good", spec=spec, max_tokens=4)])
    assert stream.error is None
    assert stream.token_ids == (1, 2, 3, 4)
    assert stream.text == "abcd"
    assert stream.outcome.qoe == 1.0  # everything came before its reader expected it
    assert stream.ttft_s is not None
    assert stream.delivered_s[1] == stream.delivered_s[2]  # one chunk, one time
    assert received[0]["vllm_xargs"] == qoe_fields(spec)
    assert received[0]["vllm_xargs"]["qoe_tenant"] == "blue"


def test_a_burst_keeps_the_order_and_reports_figures(server: Any) -> None:
    url, _ = server
    done: list[str] = []
    patient = QoESpec(ttft_s=60.0, tds=4.8)  # whatever the machine does besides
    chats = [
        Chat(prompt="good", spec=patient, arrival_s=0.05),
        Chat(prompt="without ids", spec=patient),
    ]
    streams = ChatClient(url, "m").burst(chats, lambda stream: done.append(stream.chat.prompt))
    assert [stream.chat.prompt for stream in streams] == ["good", "without ids"]
    assert sorted(done) == ["good", "without ids"]
    assert streams[0].sent_s >= 0.05
    report = summarize_burst(streams)
    assert report.streams == 2
    assert report.failed == 0
    assert report.mean_qoe == 1.0
    require_complete(streams)


def test_one_by_one_waits_for_the_end_of_each(server: Any) -> None:
    url, _ = server
    first, second = ChatClient(url, "m").one_by_one([Chat(prompt="good"), Chat(prompt="good")])
    assert second.sent_s >= first.sent_s + first.delivered_s[-1]


def test_an_empty_answer_is_no_failure(server: Any) -> None:
    [stream] = ChatClient(server[0], "m").burst([Chat(prompt="empty")])
    assert stream.error is None
    assert stream.ttft_s is None
    assert stream.outcome.counted


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("error event", "EngineCore died"),
        ("cut", "ended without its last event"),
        ("busy", "429"),
    ],
)
def test_failures_become_errors_of_their_stream(server: Any, script: str, words: str) -> None:
    streams = ChatClient(server[0], "m").burst([Chat(prompt=script), Chat(prompt="good")])
    assert streams[0].error is not None
    assert words in streams[0].error
    assert streams[0].outcome.reason == "error"
    assert streams[1].error is None
    with pytest.raises(RemoteError, match="1 of 2 streams failed") as caught:
        require_complete(streams)
    assert caught.value.exit_code == 5


def test_nobody_listening_is_told(server: Any) -> None:
    streams = ChatClient(f"http://127.0.0.1:{free_port()}/v1", "m").burst([Chat(prompt="good")])
    assert streams[0].error is not None
    assert "APIConnectionError" in streams[0].error
    assert streams[0].outcome.qoe == 0.0
    with pytest.raises(RemoteError, match="no stream delivered text"):
        summarize_burst(streams)
