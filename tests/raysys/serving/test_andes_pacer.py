"""The token pacer: golden vectors shared with JavaScript, invariants, and the stream wrappers."""

import asyncio
import itertools
import json
import math
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysys.errors import ConfigError
from raysys.machine import app_root
from raysys.serving.andes.paced_stream import paced, paced_sync
from raysys.serving.andes.pacer import Pacer, replay, split_words
from raysys.serving.andes.qoe import qoe_of_deliveries
from raysys.serving.andes.spec import QoESpec

HERE = Path(__file__).parent
VECTORS = json.loads((HERE / "andes_pacer_vectors.json").read_text(encoding="utf-8"))


def wake(due, tick):
    return due if tick == 0 else max(due, math.ceil(round(due / tick, 9)) * tick)


def play(vector):
    pacer = Pacer(QoESpec(**vector["spec"]), **vector["options"])
    shown = []

    def until(limit):
        while (due := pacer.due_s()) is not None and wake(due, vector["tick_s"]) < limit:
            shown.extend(pacer.show(wake(due, vector["tick_s"])))

    for at, tokens in vector["arrivals"]:
        until(at)
        pacer.push(tokens, at, vector["weight"])
    if vector["cancel_s"] is not None:
        until(vector["cancel_s"])
        pacer.cancel(vector["cancel_s"])
    else:
        until(vector["end_s"])
        pacer.end(vector["end_s"])
        if vector["options"]["flush"] == "now":
            shown.extend(pacer.show(vector["end_s"]))
        until(math.inf)
    return pacer, shown


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_golden_vectors(vector):
    pacer, shown = play(vector)
    expected = vector["expected"]
    report = pacer.report()
    submitted = vector["options"]["submitted_s"]
    assert shown == [token for _, token in expected["shown"]]
    assert [t + submitted for t in report.shown_s] == pytest.approx(
        [t for t, _ in expected["shown"]]
    )
    assert report.qoe == pytest.approx(expected["qoe"])
    assert (report.stalls, report.unshown) == (expected["stalls"], expected["unshown"])
    assert report.stall_s == pytest.approx(expected["stall_s"])
    assert report.longest_stall_s == pytest.approx(expected["longest_stall_s"])
    assert pacer.done


def test_javascript_twin_agrees():
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed: the JavaScript pacer is not tested here")
    command = [
        node,
        str(HERE / "andes_pacer_check.mjs"),
        str(app_root() / "actors" / "andes_web" / "pacer.js"),
        str(HERE / "andes_pacer_vectors.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{len(VECTORS)} vectors agree" in done.stdout


streams = st.lists(st.tuples(st.floats(0, 5), st.integers(0, 12)), min_size=1, max_size=25)


@given(streams, st.floats(0, 5), st.floats(0.5, 50), st.sampled_from(["eager", "anchored"]))
def test_pacer_never_loses_reorders_or_hurries(chunks, ttft_s, tds, mode):
    spec = QoESpec(ttft_s, tds)
    arrivals, at, count = [], 0.0, 0
    for gap, size in chunks:
        at += gap
        arrivals.append((at, list(range(count, count + size))))
        count += size
    pacer = Pacer(spec, mode=mode)
    shown = list(replay(pacer, arrivals, at))
    assert [token for _, token in shown] == list(range(count))
    times = [time for time, _ in shown]
    came = [at for at, tokens in arrivals for _ in tokens]
    assert all(show >= arrived for show, arrived in zip(times, came))
    assert all(b - a >= spec.tau_s - 1e-9 for a, b in itertools.pairwise(times))
    if count:
        assert pacer.report().qoe == pytest.approx(qoe_of_deliveries([came], [spec])[0])


def test_back_pressure_and_cancel():
    pacer = Pacer(QoESpec(), max_buffer=3)
    pacer.push(["a", "b", "c"], 0.0)
    assert pacer.full
    assert pacer.show(0.0) == ["a"]
    assert not pacer.full
    assert pacer.cancel(0.1) == 1
    assert pacer.report().unshown == 2
    pacer.push(["late"], 0.2)
    assert pacer.buffered == 0


@given(st.text(max_size=200))
def test_words_survive_splitting(text):
    assert "".join(split_words(text)) == text


def test_bad_options_name_the_field():
    with pytest.raises(ConfigError, match="mode"):
        Pacer(QoESpec(), mode="loud")
    with pytest.raises(ConfigError, match="flush"):
        Pacer(QoESpec(), flush="never")
    with pytest.raises(ConfigError, match="max_buffer"):
        Pacer(QoESpec(), max_buffer=0)


async def chunks_then(error=None):
    yield ["a", "b"]
    yield []
    await asyncio.sleep(0)
    yield ["c"]
    if error is not None:
        raise error


def fast_pacer(**options):
    return Pacer(QoESpec(0.0, 1000.0), time.monotonic(), **options)


def test_async_wrapper_paces_and_keeps_order():
    async def collect():
        pacer = fast_pacer(max_buffer=1)
        return [token async for token in paced(chunks_then(), pacer, time.monotonic)], pacer

    shown, pacer = asyncio.run(collect())
    assert shown == ["a", "b", "c"]
    times = pacer.report().shown_s
    assert all(b - a >= 0.001 - 1e-9 for a, b in itertools.pairwise(times))


def test_async_wrapper_shows_what_arrived_before_an_error():
    seen = []

    async def collect():
        stream = chunks_then(ConnectionError("gone"))
        async for token in paced(stream, fast_pacer(), time.monotonic):
            seen.extend([token])

    with pytest.raises(ConnectionError):
        asyncio.run(collect())
    assert seen == ["a", "b", "c"]


def test_async_wrapper_closed_early_drops_the_rest():
    async def leave():
        pacer = Pacer(QoESpec(0.0, 1.0), time.monotonic())
        stream = paced(chunks_then(), pacer, time.monotonic)
        first = await anext(stream)
        await stream.aclose()
        return first, pacer.report().unshown

    assert asyncio.run(leave()) == ("a", 1)


def test_sync_wrapper():
    assert list(paced_sync([["a"], [], ["b", "c"]], fast_pacer(), time.monotonic)) == list("abc")

    def broken():
        yield ["x", "y"]
        raise ConnectionError("gone")

    seen = []
    with pytest.raises(ConnectionError):
        seen.extend(token for token in paced_sync(broken(), fast_pacer(), time.monotonic))
    stream = paced_sync(broken(), fast_pacer(max_buffer=1), time.monotonic)
    assert next(stream) == "x"
    stream.close()
    assert seen == ["x", "y"]
