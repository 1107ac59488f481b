"""`raysys chat` against a scripted endpoint: what is printed, and how it fails."""

from __future__ import annotations

import http.server
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.serving.endpoint import free_port
from jobs import chat
from jobs.launcher import main


class Handler(http.server.BaseHTTPRequestHandler):
    received: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.received.append(body | {"authorization": self.headers["Authorization"]})
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for text in ("The ", "sky ", "is ", "blue."):
            self._send({"choices": [{"index": 0, "delta": {"content": text}}]})
        if body["model"] == "dying":
            self._send({"error": {"message": "the engine failed in mid-stream", "code": 500}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _send(self, content: dict[str, Any]) -> None:
        head = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "m"}
        self.wfile.write(b"data: " + json.dumps(head | content).encode() + b"\n\n")

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


def run_job(tmp_path: Path, *overrides: str) -> int:
    arguments = ["--run-dir", str(tmp_path / "run")]
    for override in overrides:
        arguments += ["--set", override]
    return main(chat.JOB, arguments)


@pytest.mark.parametrize("paced", ["true", "false"])
def test_one_question_prints_its_answer(
    server: Any, tmp_path: Path, capsys: Any, paced: str
) -> None:
    url, received = server
    code = run_job(tmp_path, f"url={url}", "prompt=Why?", "tds=100", f"paced={paced}")
    assert code == 0
    output = capsys.readouterr()
    assert "The sky is blue." in output.out
    assert "4 tokens, first after" in output.err
    assert received[0]["messages"] == [{"role": "user", "content": "Why?"}]
    assert received[0]["vllm_xargs"]["qoe_tds"] == 100


def test_a_conversation_remembers_and_ends_with_an_empty_line(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, received = server
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nAnd then?\n\nnot sent\n"))
    assert run_job(tmp_path, f"url={url}", "tds=100") == 0
    assert [len(request["messages"]) for request in received] == [1, 3]
    assert received[1]["messages"][1] == {"role": "assistant", "content": "The sky is blue."}


def test_the_key_comes_from_a_file_and_stays_out_of_the_run(server: Any, tmp_path: Path) -> None:
    url, received = server
    key = tmp_path / "key"
    key.write_text("blue-secret\n")
    assert run_job(tmp_path, f"url={url}", "prompt=Hi", "tds=100", f"key_file={key}") == 0
    assert received[0]["authorization"] == "Bearer blue-secret"
    texts = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert texts
    assert not any(b"blue-secret" in text for text in texts)


def test_an_engine_that_dies_in_mid_stream_ends_with_code_5(
    server: Any, tmp_path: Path, capsys: Any
) -> None:
    code = run_job(tmp_path, f"url={server[0]}", "prompt=Hi", "tds=100", "model=dying")
    assert code == 5
    output = capsys.readouterr()
    assert "The sky is blue." in output.out  # what had arrived was shown
    assert "the engine failed in mid-stream" in output.err


@pytest.mark.parametrize(
    ("override", "code", "words"),
    [
        ("url=ftp://x", 2, "http://"),
        ("tds=-1", 2, "tds"),
        ("temperature=9", 2, "temperature"),
        ("key_file=/nowhere/key", 6, "/nowhere/key"),
    ],
)
def test_bad_settings_are_told(
    tmp_path: Path, capsys: Any, override: str, code: int, words: str
) -> None:
    assert run_job(tmp_path, "prompt=Hi", override) == code
    assert words in capsys.readouterr().err


def test_nobody_listening_ends_with_code_5(tmp_path: Path, capsys: Any) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    assert run_job(tmp_path, f"url={url}", "prompt=Hi") == 5
    assert "raysys serve" in capsys.readouterr().err
