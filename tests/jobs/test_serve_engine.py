"""One real engine, started as a user would with Ray's own tool, and everything asked of it.

The tests run in order on the one engine; the last one kills it.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from actors.andes.engine_settings import read_status
from actors.serving import packaged_model
from actors.serving.client import Stream, require_complete, summarize_burst
from raysys.serving.andes.routing import load_from_dict
from tests.actors.serving_browser import browser, chromium
from tests.jobs.serving_endpoint import (
    KEY,
    PATIENCE_S,
    START_S,
    answers,
    ask,
    chat_once,
    chats,
    client_of,
    engine_processes,
    everything_is_free,
    open_stream,
    post,
    psutil,
    served_endpoint,
    status_file,
    wait_for,
)
from tests.jobs.serving_fuzz import fuzz

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
endpoint = served_endpoint
HI = [{"role": "user", "content": "Hi"}]
LONE = {"role": "user", "content": "\ud800"}  # a lone surrogate: valid JSON, and no text


def test_a_burst_streams_token_by_token(endpoint: str) -> None:
    client = client_of(endpoint)
    streams = client.burst(chats(4))
    require_complete(streams)
    for stream in streams:
        assert len(stream.delivered_s) == 24
        assert len(set(stream.delivered_s)) >= 20  # one token a chunk: no batching on the way
        assert stream.text
    report = summarize_burst(streams)
    assert 0.0 < report.mean_qoe <= 1.0
    assert report.ttft_s > 0.0


def test_equal_chats_get_equal_tokens(endpoint: str) -> None:
    client = client_of(endpoint)
    first, second = client.burst([chats(1)[0], chats(1)[0]])
    assert first.token_ids == second.token_ids


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"model": "nobody", "messages": [{"role": "user", "content": "Hi"}]}, 404),
        (
            {"model": packaged_model.NAME, "messages": [{"role": "user", "content": "x " * 400}]},
            400,
        ),
        (
            {"model": packaged_model.NAME, "messages": [{"role": "user", "content": "y" * 10**7}]},
            400,
        ),
        ({"model": packaged_model.NAME, "messages": []}, 400),
        ({"model": packaged_model.NAME, "messages": "Hi"}, 400),
        ({"model": packaged_model.NAME}, 400),
        (b"{not json", 400),
        (b"", 400),
        (b"[1, 2]", 400),
        (b"\xff\xfe", 400),
    ],
)
def test_bad_requests_are_refused_with_their_status(endpoint: str, body: Any, status: int) -> None:
    got, text = ask(f"{endpoint}/v1/chat/completions", body)
    assert got == status, text


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/chat/completions", {"messages": [{"author": {"role": "user"}}]}, "messages[0].role"),
        (
            "/v1/chat/completions",
            {"messages": HI, "logprobs": True, "top_logprobs": 99},
            "logprobs",
        ),
        ("/v1/chat/completions", {"messages": HI, "temperature": float("nan")}, "temperature"),
        ("/v1/chat/completions", {"messages": [LONE]}, "messages"),
        ("/v1/completions", {"prompt": [10**12]}, None),
        ("/v1/completions", {"prompt": "x", "use_beam_search": True, "n": 0}, None),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/detokenize", {"tokens": [10**12]}, "tokens"),
    ],
)
def test_what_an_engine_cannot_read_is_the_clients_mistake(
    endpoint: str, path: str, body: Any, field: str | None
) -> None:
    status, text = ask(f"{endpoint}{path}", {"model": packaged_model.NAME, **body})
    assert status == 400, text
    error = json.loads(text)["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == field, text


def test_texts_become_tokens_and_texts_again(endpoint: str) -> None:
    named = {"model": packaged_model.NAME}
    status, answer = ask(f"{endpoint}/tokenize", named | {"prompt": "The sky is blue."})
    assert status == 200, answer
    assert answer["count"] == len(answer["tokens"]) >= 4
    status, answer = ask(f"{endpoint}/detokenize", named | {"tokens": answer["tokens"]})
    assert (status, answer["prompt"]) == (200, "The sky is blue.")
    assert ask(f"{endpoint}/tokenize", named | {"prompt": "x"}, Authorization="")[0] == 401


def test_bad_targets_are_refused_and_named(endpoint: str) -> None:
    chat = {"model": packaged_model.NAME, "messages": [{"role": "user", "content": "Hi"}]}
    for value in (-1, True, float("nan"), "fast"):
        body = chat | {"vllm_xargs": {"qoe_tds": value}}
        status, text = ask(f"{endpoint}/v1/chat/completions", body)
        assert status == 422, (value, text)
        assert json.loads(text)["error"]["param"] == "qoe_tds"
    status, text = ask(f"{endpoint}/v1/chat/completions", chat, **{"X-QoE-TTFT-S": "-3"})
    assert status == 422
    assert json.loads(text)["error"]["param"] == "qoe_ttft_s"


def test_another_content_type_is_refused(endpoint: str) -> None:
    body = json.dumps(
        {"model": packaged_model.NAME, "messages": [{"role": "user", "content": "Hi"}]}
    ).encode()
    url = f"{endpoint}/v1/chat/completions"
    for kind in ("text/plain", "application/xml", "multipart/form-data"):
        status, text = ask(url, body, **{"Content-Type": kind})
        assert status == 415, text


def test_the_schema_holds_under_fuzzing(endpoint: str) -> None:
    """Whatever fits the endpoint's own schema, and what does not, gets an answer below 500."""
    report = fuzz(endpoint, KEY, packaged_model.NAME, examples=6)
    assert report.calls >= 40
    assert report.operations >= 6
    assert not report.failures, report.failures[:3]
    wait_for(everything_is_free, "the engine after the fuzz")


def test_the_page_and_its_burst(endpoint: str) -> None:
    with urllib.request.urlopen(f"{endpoint}/", timeout=30) as page:
        assert b"page/app.js" in page.read()
        assert "default-src 'self'" in page.headers["Content-Security-Policy"]
    assert ask(f"{endpoint}/page/none.js")[0] == 404
    assert ask(f"{endpoint}/qoe", None, Authorization="")[0] == 401
    burst = {"policy": "fcfs", "chats": 3, "tokens": 6, "spread_s": 0.0, "tds": 3.0}
    assert ask(f"{endpoint}/qoe/bursts", burst | {"chats": 10_000})[0] == 400
    assert ask(f"{endpoint}/qoe/bursts", burst, Origin="http://elsewhere")[0] == 403
    assert ask(f"{endpoint}/qoe/bursts", burst)[0] == 202
    assert ask(f"{endpoint}/qoe/bursts", burst)[0] == 409

    def done() -> Any:
        [last] = ask(f"{endpoint}/qoe")[1]["bursts"]
        return None if last["running"] else last

    last = wait_for(done, "the burst")
    assert last["done"] == 3
    assert 0.0 < last["worst_qoe"] <= last["mean_qoe"] <= 1.0
    status = read_status(status_file())
    assert status is not None
    assert status["policy"] == "fcfs"
    series = ask(f"{endpoint}/qoe")[1]["series"]
    assert series
    assert all(0.0 <= point["qoe"] <= 1.0 and point["live"] >= 0 for point in series)
    chats_again = {"policy": "andes", "chats": 1, "tokens": 2, "spread_s": 0.0}
    assert ask(f"{endpoint}/qoe/bursts", chats_again)[0] == 202


@pytest.mark.skipif(chromium() is None, reason="no Chromium: apt-get install chromium")
def test_the_page_shows_live_streams(endpoint: str, tmp_path: Path) -> None:
    with browser(tmp_path / "profile") as tab:
        tab.call("Page.navigate", url=f"{endpoint}/")
        # This endpoint wants a key, so the page asks for one.
        tab.until("document.getElementById('keyfield')?.hidden === false")
        tab.value("document.getElementById('key').focus()")
        tab.type(KEY)
        tab.until(f"document.getElementById('model').textContent === '{packaged_model.NAME}'")
        tab.value("document.getElementById('prompt').focus()")
        tab.type("Why is the sky blue?")
        tab.press("Enter", "Enter")
        texts = "[...document.querySelectorAll('.paced')].map((one) => one.textContent.length)"
        tab.until(f"Math.min(...{texts}) > 40", PATIENCE_S)
        tab.picture(tmp_path / "page.png")
        assert "QoE" in tab.value("document.querySelector('.outcome').textContent")
        tab.press("Escape", "Escape")
    wait_for(everything_is_free, "the streams that were stopped")


def test_the_controller_has_the_replicas_statistics(endpoint: str) -> None:
    """What the router decides by comes from the engine and is fresh."""
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)

    def fresh() -> Any:
        found = ray.get(controller._all_running_replicas.remote())
        stats = [one.routing_stats for name, ones in found.items() for one in ones
                 if "QoEServer" in str(name)]  # fmt: skip
        load = load_from_dict(stats[0].get("load") or {}) if stats else None
        return load if load is not None and time.time() - load.time_s < 60.0 else None

    load = wait_for(fresh, "routing statistics")
    assert load.max_batch == 8
    assert load.capacity_tokens == 2048
    assert 1.0 < load.speed() < 10_000.0


def test_without_the_key_nobody_enters(endpoint: str) -> None:
    chat = {"model": packaged_model.NAME, "messages": [{"role": "user", "content": "Hi"}]}
    for wrong in ("Bearer red-secret", "Basic blue-secret", ""):
        status, text = ask(f"{endpoint}/v1/chat/completions", chat, Authorization=wrong)
        assert status == 401, text


def test_a_full_endpoint_says_when_to_come_back(endpoint: str) -> None:
    chat = {"model": packaged_model.NAME, "messages": [{"role": "user", "content": "Hi"}]}
    with open_stream(endpoint, n=6):  # six answers, as many as may be inside
        with pytest.raises(urllib.error.HTTPError) as caught:
            post(f"{endpoint}/v1/chat/completions", chat)
        with caught.value as refusal:
            assert refusal.code == 429
            assert 1 <= int(refusal.headers["Retry-After"]) <= 60
            assert json.loads(refusal.read())["error"]["type"] == "rate_limit_error"
        [stream] = client_of(endpoint).burst(chats(1))
        assert "429" in (stream.error or "")
    wait_for(lambda: chat_once(endpoint), "a place")


def test_more_answers_than_places_are_refused(endpoint: str) -> None:
    chat = {"model": packaged_model.NAME, "messages": [{"role": "user", "content": "Hi"}]}
    status, text = ask(f"{endpoint}/v1/chat/completions", chat | {"n": 7})
    assert status == 422
    assert json.loads(text)["error"]["param"] == "n"
    status, answer = ask(f"{endpoint}/v1/chat/completions", chat | {"n": 2, "max_tokens": 2})
    assert status == 200
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]


def test_clients_that_leave_give_their_places_back(endpoint: str) -> None:
    for _ in range(6):  # as many as may be inside
        with open_stream(endpoint):
            pass
    wait_for(everything_is_free, "the blocks of those who left")
    assert wait_for(lambda: chat_once(endpoint), "a place")
    assert wait_for(lambda: not any(s.error for s in client_of(endpoint).burst(chats(6, 2))), "all")


def test_a_killed_engine_fails_its_streams_and_is_replaced(endpoint: str) -> None:
    [engine] = engine_processes()
    workers = engine.children(recursive=True)
    result: list[Stream] = []
    thread = threading.Thread(
        target=lambda: result.extend(client_of(endpoint).burst(chats(2, max_tokens=200)))
    )
    thread.start()
    wait_for(lambda: (read_status(status_file()) or {}).get("running") == 2, "both streams")
    with open_stream(endpoint) as raw:
        engine.kill()
        seen = b""
        while b"[DONE]" not in seen:
            piece = raw.recv(4096)
            assert piece, "a cut line instead of an error event"
            seen += piece
        assert b'data: {"error"' in seen  # told in the stream, not by a cut line
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert all(stream.error for stream in result)
    assert all(stream.outcome.reason == "error" for stream in result)
    wait_for(lambda: answers(endpoint), "the replacement", START_S)
    [replacement] = wait_for(engine_processes, "its process")
    assert replacement.pid != engine.pid
    left = [worker.pid for worker in workers]
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in left), "the old engine's workers")
    require_complete(client_of(endpoint).burst(chats(1, max_tokens=4)))
