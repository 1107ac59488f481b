"""A headless Chromium for tests, driven over its debugging protocol; and a stand-in endpoint."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from websockets.sync.client import connect

from actors.serving.page_files import page_files

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--remote-debugging-port=0", "--window-size=1280,1000", "about:blank",
)  # fmt: skip
TOKENS = ("The", "sky", "is", "blue", "because", "air", "scatters", "short", "waves", "of", "light")


class Browser:
    """One tab."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self.problems: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=30))
            if message.get("id") == number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        if message.get("method") == "Runtime.exceptionThrown":
            self.problems.append(str(message["params"]["exceptionDetails"]))
        if message.get("method") == "Log.entryAdded":
            entry = message["params"]["entry"]
            if entry["level"] == "error":
                self.problems.append(entry["text"])

    def value(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, expression: str, seconds: float = 60.0) -> Any:
        deadline = time.monotonic() + seconds
        while not (value := self.value(expression)):
            assert time.monotonic() < deadline, f"{expression}: {self.problems}"
            threading.Event().wait(0.05)
        return value

    def press(self, key: str, code: str, *, alt: bool = False) -> None:
        keys = {"Enter": 13, "Escape": 27, "Tab": 9, "b": 66}
        options = {
            "key": key, "code": code, "windowsVirtualKeyCode": keys[key],
            "modifiers": 1 if alt else 0,
        }  # fmt: skip
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **options, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **options)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def scheme(self, name: str) -> None:
        feature = {"name": "prefers-color-scheme", "value": name}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def picture(self, path: Path) -> None:
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))


def chromium() -> str | None:
    """Path of a Chromium or Chrome, or None."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Start Chromium with a profile in ``folder``."""
    command = [str(chromium()), *FLAGS[:-1], f"--user-data-dir={folder}", FLAGS[-1]]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with connect(_tab(folder, process), max_size=None, open_timeout=20) as socket:
            yield Browser(socket)
    finally:
        process.terminate()
        process.wait(20)


def _tab(folder: Path, process: Any) -> str:
    port_file = folder / "DevToolsActivePort"
    deadline = time.monotonic() + 60
    while not (port_file.exists() and len(port_file.read_text().splitlines()) == 2):
        assert process.poll() is None, "Chromium ended"
        assert time.monotonic() < deadline, "Chromium did not start"
        threading.Event().wait(0.1)
    port, _ = port_file.read_text().splitlines()
    new = Request(f"http://127.0.0.1:{port}/json/new?about:blank", method="PUT")
    with urlopen(new, timeout=20) as answer:
        address: str = json.loads(answer.read())["webSocketDebuggerUrl"]
    return address


class StandIn(ThreadingHTTPServer):
    """The page's own files, and answers of an endpoint without an engine.

    A chat gets eight tokens at once, then one every 40 ms. ``left`` counts clients that went away.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[dict[str, Any]] = []
        self.bursts: list[dict[str, Any]] = []
        self.left = 0
        self.answer_tokens = 30
        self.bursts_allowed = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def state(self) -> dict[str, Any]:
        series = [
            {"t": float(t), "qoe": 1.0 - 0.004 * (t % 50), "live": float(t % 9), "behind": 0.2}
            for t in range(0, 300, 2)
        ]
        return {
            "now_s": 300.0, "model": "stand-in", "bursts_allowed": self.bursts_allowed,
            "policy": "andes", "series": series, "tenants": {}, "refused": 0, "inside": 1,
            "bursts": self.bursts,
        }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        return

    def do_GET(self) -> None:
        if self.path == "/qoe":
            return self._send(200, json.dumps(self.server.state()).encode(), "application/json")
        name = "index.html" if self.path == "/" else self.path.removeprefix("/page/")
        found = page_files().get(name)
        return self._send(200, *found) if found else self._send(404, b"{}", "application/json")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/qoe/bursts":
            self.server.bursts.append(
                {"policy": body["policy"], "chats": body["chats"], "done": 3, "running": False,
                 "mean_qoe": 0.91, "worst_qoe": 0.5, "ttft_s": 1.25, "seconds": 9.0,
                 "started_s": 1.0}
            )  # fmt: skip
            return self._send(202, b'{"started": true}', "application/json")
        self.server.asked.append(body)
        if "fail" in body["messages"][-1]["content"]:
            error = {"error": {"message": "the endpoint is full"}}
            return self._send(429, json.dumps(error).encode(), "application/json")
        return self._stream()

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            for number in range(self.server.answer_tokens):
                token = TOKENS[number % len(TOKENS)] + " "
                event = {"choices": [{"index": 0, "delta": {"content": token}}]}
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                self.wfile.flush()
                if number >= 8:
                    threading.Event().wait(0.04)
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.server.left += 1
        self.close_connection = True

    def _send(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def stand_in() -> Iterator[StandIn]:
    """Run the stand-in on a free port."""
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
